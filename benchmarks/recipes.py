"""Recipes side by side on real images: each is fitted and measured on each data set with each seed; resumable."""

import contextlib
import csv
import tempfile
import time
from pathlib import Path
from typing import Any

from project.training.cli import Cli
from project.training.trainer import quieten

KEY = ("data", "recipe", "seed")
FIGURES = [f"{split}/{name}" for split in ("val", "test") for name in ("loss", "accuracy", "f1", "auroc")]


def recipes(
    data: dict[str, str], recipe: dict[str, str], table: Path = Path("recipes.csv"), seeds: int = 3, minutes: float = 60
) -> None:
    """Appends a row to a CSV for each fit, with the figures of its best.ckpt; rows that are there are not run again.

    Args:
        data: Options of fit for each data set, by its name: benchmarks/recipes.yaml has those of docs/recipe.md.
        recipe: Options for each recipe, by its name.
        table: The CSV.
        seeds: Number of seeds, from 0, each with another split; all recipes get the first one before the second.
        minutes: After which no further fit starts.
    """
    quieten()
    end, is_new = time.monotonic() + 60 * minutes, not table.exists() or not table.stat().st_size
    with table.open("a+", newline="") as stream:
        stream.seek(0)
        done = [tuple(row[name] for name in KEY) for row in csv.DictReader(stream)]
        writer = csv.writer(stream)
        writer.writerows([(*KEY, *FIGURES, "seconds")] * is_new)
        for key in ((root, name, str(seed)) for seed in range(seeds) for root in data for name in recipe):
            if key not in done and time.monotonic() < end:
                seed = [f"--{option}={key[2]}" for option in ("seed_everything", "data.split_seed")]
                writer.writerow(row := [*key, *_measure([*data[key[0]].split(), *recipe[key[1]].split(), *seed])])
                stream.flush()
                print(*row, flush=True)


def _measure(words: list[str]) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        root, started, figures = f"--trainer.default_root_dir={folder}", time.perf_counter(), dict[str, Any]()
        Cli("fit", [*words, root])
        seconds = time.perf_counter() - started
        for verb in ("validate", "test"):
            figures |= Cli(verb, [f"--ckpt_path={folder}/runs/latest"]).trainer.callback_metrics
    return [f"{figures[name]:.4f}" for name in FIGURES] + [f"{seconds:.0f}"]
