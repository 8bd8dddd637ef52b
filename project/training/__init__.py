"""What surrounds a fit: the command line of fit, validate and test, callbacks, checkpoints, resuming."""
