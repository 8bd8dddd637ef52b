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
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.tuner.tuning import Tuner

from project import figures, files, training
from project.bench.training import seconds_per_step
from project.classifier import make_optimizer
from project.errors import UserError

LOWEST, HIGHEST = 1e-7, 1.0  # learning rates
ENOUGH = 30  # finite losses without which nothing can be told
BATCHES = (16, 32, 64, 128, 256)
STEPS = 16  # an epoch should have, whatever the speed: few large steps learn less


class Tuning(training.Cli):
    """Takes the options of `fit`, and runs Lightning's Tuner in the place of the fit. Writes the plot, and no run."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.add_argument("--steps", type=int, default=100, help="Training steps of the learning rate finder.")
        parser.add_argument("--plot", type=str, default="lr-finder.png", help="Its picture; must not exist.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As for a fit; there is no run to go on with."""
        if any(word.split("=")[0] == "--resume" for word in self.argv):
            raise UserError("tune looks at a fit that is still to begin; leave --resume out.")
        super().parse_arguments(parser, args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer without what a run has: it keeps its temporary files away and nothing else."""
        options = self.config_init["fit"]
        files.require_new(Path(options["plot"]), "plot")
        if options["steps"] < ENOUGH:
            raise UserError(f"--steps is {options['steps']}; it takes {ENOUGH} to tell anything.")
        self.folder = tempfile.TemporaryDirectory()
        machine = {key: options["trainer"][key] for key in ("accelerator", "precision")}
        return Trainer(
            **machine,
            devices=1,  # the finders do not work with DDP (Lightning-AI/pytorch-lightning#20994)
            default_root_dir=self.folder.name,
            max_epochs=-1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            log_every_n_steps=1,
        )

    def before_fit(self) -> None:
        """Nothing: there is no run."""

    def after_fit(self) -> None:
        """Nothing: there is no run."""

    def fit(self, **_: Any) -> None:
        """Prints what was found and the command that uses it."""
        options = self.config.fit
        data, model = self.datamodule, self.model
        print(data.manifest.summary())
        batch = self._batch_size()
        if batch is not None:
            data._batch_size = batch  # the rate is looked for at this size
        quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())  # its progress bar
        with quiet:
            finder = Tuner(self.trainer).lr_find(
                model, datamodule=data, min_lr=LOWEST, max_lr=HIGHEST, num_training=options.steps
            )
        assert finder is not None  # only fast_dev_run has none
        self.folder.cleanup()
        rates, losses = np.array(finder.results["lr"]), np.array(finder.results["loss"])
        rate, reason = suggest(rates, losses)
        with files.replacing_bytes(Path(options.plot)) as stream:
            figures.rate_finder(rates, losses, rate).savefig(stream, dpi=120, format="png")
        print(f"learning rate: {reason}; {options.plot} shows it")
        if len(self.trainer.optimizers[0].param_groups) > 1:
            print("learning rate: the same for all layers here; in a fit those below the head have --model.backbone_lr")
        found = {"--model.lr": rate and f"{rate:.2g}", "--data.batch_size": batch and str(batch)}
        found = {option: value for option, value in found.items() if value}
        command = ["python", "-m", "project.cli", "fit", *self._own_words(found)]
        print(f"next: {shlex.join([*command, *(word for pair in found.items() for word in pair if word)])}")

    def _own_words(self, replaced: Container[str]) -> list[str]:
        """The command line without what belongs to tune, or is replaced."""
        words: list[str] = []
        skip = False
        for word in self.argv:
            name = word.split("=")[0]
            if skip or name in ("--steps", "--plot") or name in replaced:
                skip = not skip and "=" not in word
            else:
                words.append(word)
        return words

    def _batch_size(self) -> int | None:
        """The smallest batch within 5 % of the best speed, of those that fit and leave an epoch its steps."""
        data = self.datamodule
        rows = len(data.dataset("train"))
        sizes = [size for size in BATCHES if size * STEPS <= rows]
        if not sizes:
            print(f"batch size: {rows} training pictures are too few to compare any; {data.batch_size} is used")
            return None
        speed: dict[int, float] = {}
        for size in sizes:
            try:
                speed[size] = self._speed(size)
            except (RuntimeError, MemoryError) as error:
                if "memory" not in str(error).lower():
                    raise
                print(f"batch size: {size} does not fit into the memory")
                break
        if not speed:
            return None
        chosen = next(size for size, value in speed.items() if value >= 0.95 * max(speed.values()))
        shown = ", ".join(f"{size}: {value:,.0f}" for size, value in speed.items())
        print(f"batch size: training steps take this many pictures a second: {shown}")
        return chosen

    def _speed(self, size: int) -> float:
        """Pictures a second in training steps of one batch size, reading left out."""
        device = self.trainer.strategy.root_device
        model = self.model.to(device).train()
        trained = [{"params": [p for p in model.network.parameters() if p.requires_grad], "lr": 0.0}]  # they stay
        optimizer = make_optimizer(model.rule, trained, fused=self.trainer.precision != "16-mixed")
        with self.trainer.precision_plugin.forward_context():
            return size / seconds_per_step(model.network, optimizer, size, self.datamodule.image_size, device)


def suggest(rates: np.ndarray[Any, Any], losses: np.ndarray[Any, Any]) -> tuple[float | None, str]:
    """A highest learning rate from a range test, or None, and why.

    Args:
        rates: (N,) rising.
        losses: (N,) smoothed training loss when each had been used.

    Returns:
        A tenth of the rate with the lowest loss, None where its fall cannot be told from its own noise; and a sentence.
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
            f"cannot tell: the loss went from {start:.3f} to {losses[lowest]:.3f} at best, which may be noise "
            f"(its deviation is {noise:.3f} where nothing is learned yet); keep the default, or give more --steps"
        )
    rate = float(rates[lowest]) / 10
    digits = 10 ** math.floor(math.log10(rate))
    return round(rate / digits) * digits, (
        f"the loss falls from {start:.3f} to {losses[lowest]:.3f}, its lowest, at {rates[lowest]:.1e}; a tenth of that "
        "is taken"
    )
