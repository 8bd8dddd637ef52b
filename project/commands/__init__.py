"""The verbs other than the Trainer's: one file with one typed function each."""
