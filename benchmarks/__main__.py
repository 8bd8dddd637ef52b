"""Compares this project with others: python -m benchmarks NAME [--json FILE]; --help lists the names."""

import argparse
import json
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from benchmarks.accuracy import accuracy
from benchmarks.bundle import bundle
from benchmarks.ddp import ddp
from benchmarks.predict import predict
from benchmarks.read import reading
from benchmarks.recipes import recipes
from benchmarks.serve import serve
from benchmarks.shards import shards
from benchmarks.train import precision, training

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path)
    options, words = parser.parse_known_args()
    benchmarks: Any = [training, precision, reading, predict, serve, bundle, accuracy, recipes, ddp, shards]
    figures = auto_cli(benchmarks, args=words or ["training"], as_positional=False)
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=2))
