"""A path to probabilities, without Lightning."""
