"""Pictures on disk to uint8 batches; imports nothing else of the package but its errors."""
