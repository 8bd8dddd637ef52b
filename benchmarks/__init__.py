"""Measurements of this project beside others, in one run: python -m benchmarks NAME, or make bench ARGS=NAME."""
