"""Finds a learning rate and a batch size for a fit: python -m project.cli tune --data.root photos."""

import io
import math
import shlex
import sys
import tempfile
from collections.abc import Container
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.tuner.tuning import Tuner

from project import files
from project.errors import UserError
from project.evaluation import figures
from project.optim import make_optimizer
from project.training import cli as trainer_cli
from project.training.throughput import seconds_per_step

LOWEST, HIGHEST = 1e-7, 1.0  # learning rates
ENOUGH = 30  # finite losses; fewer are too few to tell a fall from noise
BATCH_SIZES = (16, 32, 64, 128, 256)
STEPS = 16  # that an epoch should have, whatever the speed: few large steps learn less
Steps = restricted_number_type("Steps", int, (">=", ENOUGH))


class Tuning(trainer_cli.Cli):
    """Takes the options of `fit` and runs Lightning's Tuner. Writes the plot and no run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": trainer_cli.Cli.subcommands()["fit"]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        text = (
            "Finds a learning rate and a batch size; --model.* and --data.* are those of fit, whose other options are"
        )
        texts = {"usage": "python -m project.cli tune [options]", "description": f"{text} ignored."}
        return super().init_parser(**kwargs | texts)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--steps", type=Steps, default=100, help="Training steps of the learning rate finder.")
        parser.add_argument("--plot", type=str, default="lr-finder.png", help="Its plot; must not exist.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if any(word.split("=")[0] == "--resume" for word in self.argv):
            raise UserError("tune prepares a new fit; leave --resume out.")
        super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Makes data, model and a Trainer that leaves no files."""
        self.config_init = self.parser.instantiate_classes(self.config)
        options = self.config_init["fit"]
        files.require_new(Path(options["plot"]), "plot")
        self.datamodule, self.model, self.folder = options["data"], options["model"], tempfile.TemporaryDirectory()
        self.trainer = Trainer(
            accelerator=options["trainer"]["accelerator"],
            precision=options["trainer"]["precision"],
            devices=1,  # the finders do not work with DDP (Lightning-AI/pytorch-lightning#20994)
            default_root_dir=self.folder.name,
            max_epochs=-1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            limit_val_batches=0,
            log_every_n_steps=1,
        )
        self.datamodule.setup("fit")

    def before_fit(self) -> None:
        """Nothing: there is no run."""

    def after_fit(self) -> None:
        """Nothing: there is no run."""

    def fit(self, **_: Any) -> None:
        """Prints the learning rate, the batch size, and the command that uses them."""
        options, data = self.config.fit, self.datamodule
        print(data.manifest.summary())
        batch = self._batch_size()
        if batch is not None:
            data.batch_size = batch  # for the learning rate finder
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):  # its progress bar
            finder = Tuner(self.trainer).lr_find(
                self.model, datamodule=data, min_lr=LOWEST, max_lr=HIGHEST, num_training=int(options.steps)
            )
        assert finder is not None  # only with fast_dev_run
        self.folder.cleanup()
        rates, losses = np.array(finder.results["lr"]), np.array(finder.results["loss"])
        rate, reason = suggest(rates, losses)
        with files.replacing_bytes(Path(options.plot)) as stream:
            figures.rate_finder(rates, losses, rate).savefig(stream, dpi=120, format="png")
        print(f"learning rate: {reason}; see {options.plot}")
        if len(self.trainer.optimizers[0].param_groups) > 1:
            print(
                "learning rate: the same for all layers here; a fit multiplies it by --model.backbone_lr below the head"
            )
        found = {"--model.lr": f"{rate:.2g}"} if rate else {}
        found |= {"--data.batch_size": str(batch)} if batch else {}
        words = [*self._fit_words(found), *(word for pair in found.items() for word in pair)]
        print(f"next: python -m project.cli fit {shlex.join(words)}")

    def _fit_words(self, replaced: Container[str]) -> list[str]:
        """The command line without tune's own options and those that are replaced."""
        words, rest = list[str](), iter(self.argv)
        for word in rest:
            name, equals, _ = word.partition("=")
            if name not in ("--steps", "--plot") and name not in replaced:
                words.append(word)
            elif not equals:
                next(rest, None)
        return words

    def _batch_size(self) -> int | None:
        """The smallest batch within 5 % of the best speed, of those that fit and leave an epoch its steps."""
        rows = len(self.datamodule.dataset("train"))
        speed: dict[int, float] = {}
        for size in (size for size in BATCH_SIZES if size * STEPS <= rows):
            try:
                speed[size] = self._speed(size)
            except (RuntimeError, MemoryError) as error:
                if "memory" not in str(error).lower():
                    raise
                print(f"batch size: {size} does not fit into the memory")
                break
        if not speed:
            print(f"batch size: {self.datamodule.batch_size}; {rows} training images are too few to compare any")
            return None
        print(f"batch size: images a second in training: {', '.join(f'{k}: {v:,.0f}' for k, v in speed.items())}")
        return next(size for size, value in speed.items() if value >= 0.95 * max(speed.values()))

    def _speed(self, size: int) -> float:
        """Images a second in training steps of a batch size, reading excluded."""
        device = self.trainer.strategy.root_device
        model = self.model.to(device).train()
        groups = [{"params": [p for p in model.network.parameters() if p.requires_grad], "lr": 0.0}]  # nothing changes
        optimizer = make_optimizer(model.rule, groups, fused=self.trainer.precision != "16-mixed")
        with self.trainer.precision_plugin.forward_context():
            return size / seconds_per_step(model.network, optimizer, size, self.datamodule.image_size, device)


def suggest(rates: np.ndarray[Any, Any], losses: np.ndarray[Any, Any]) -> tuple[float | None, str]:
    """Chooses a learning rate from a range test.

    Args:
        rates: (N,) rising.
        losses: (N,) smoothed training loss after each rate.

    Returns:
        A tenth of the rate with the lowest loss, or None where the fall of the loss may be noise; and a sentence.
    """
    finite = np.isfinite(losses)
    rates, losses = rates[finite], losses[finite]
    if len(losses) < ENOUGH:
        return None, f"cannot tell: {len(losses)} losses are too few; give more --steps"
    third = len(losses) // 3  # at these rates nothing is learned yet
    early = losses[third // 3 : third]  # the first few are not smoothed yet
    lowest = third + int(losses[third:].argmin())
    start, noise = float(np.median(early)), float(early.std())
    fall = start - float(losses[lowest])
    if fall < max(4 * noise, 0.03 * abs(start)):
        return None, (
            f"cannot tell: the loss went from {start:.3f} to {losses[lowest]:.3f} at best, which may be noise (its "
            f"standard deviation is {noise:.3f}); keep the default, or give more --steps"
        )
    rate = float(rates[lowest]) / 10
    digits = 10 ** math.floor(math.log10(rate))
    return round(rate / digits) * digits, (
        f"a tenth of {rates[lowest]:.1e}, where the loss is lowest: it falls from {start:.3f} to {losses[lowest]:.3f}"
    )
