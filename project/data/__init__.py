"""Images on disk to uint8 batches; of the package it imports errors and files, nothing else."""
