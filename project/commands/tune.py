"""Finds a learning rate and a batch size for a fit: python -m project.cli tune --data.root photos."""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.tuner.tuning import Tuner

from project import files
from project.errors import UserError, command
from project.evaluation import figures
from project.optim import make_optimizer, set_mode
from project.training import cli as trainer_cli
from project.training.throughput import seconds_per_step

STEPS = 100  # of the learning rate finder, at most
LOWEST, HIGHEST = 1e-7, 1.0  # learning rates
BETA = 0.98  # of the finder's running mean of the loss
ENOUGH = 24  # steps; with less than two thirds as many finite losses, a fall cannot be told from noise
BATCH_SIZES = (16, 32, 64, 128, 256)
EPOCH_STEPS = 16  # that an epoch should have, whatever the speed: few large steps learn less
DESCRIPTION = "Finds a learning rate and a batch size for a fit with the same --model.* and --data.* options."
Steps = restricted_number_type("Steps", int, (">=", ENOUGH))


class Tuning(trainer_cli.Cli):
    """Takes the options of `fit` and runs Lightning's Tuner. Writes the plot and no run."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        texts = {"usage": "python -m project.cli tune [DIR] [options]", "description": DESCRIPTION}
        return super().init_parser(**kwargs | texts)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        steps = f"Steps of the learning rate finder; by default {STEPS}, or those of three epochs, at least {ENOUGH}."
        plot = "Its plot; must not exist. By default lr-finder.png in runs/NAME, or lr-finder-2.png, and so on."
        parser.add_argument("--steps", type=Steps | None, default=None, help=steps)
        parser.add_argument("--plot", type=str | None, default=None, help=plot)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if any(word.partition("=")[0] == "--resume" for word in self.argv):
            raise UserError("tune prepares a new fit; leave --resume out.")
        super().parse_arguments(parser, args)

    def instantiate_trainer(self, **_: Any) -> Trainer:
        """Makes a Trainer that leaves no files."""
        if self.config.fit.plot is not None:
            files.require_new(Path(self.config.fit.plot), "plot")
        options = self.config_init.fit.trainer
        return Trainer(
            accelerator=options.accelerator,
            precision=options.precision,
            devices=1,  # the finder does not work with DDP (Lightning-AI/pytorch-lightning#20994)
            default_root_dir=tempfile.gettempdir(),  # for the finder's checkpoint, which it removes
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )

    def fit(self, **_: Any) -> None:
        """Prints the learning rate, the batch size, and the command that uses them."""
        data, options, found = self.datamodule, self.config.fit, dict[str, str]()
        print(data.manifest.summary())
        if batch := self._batch_size():
            data.batch_size = batch  # for the learning rate finder
            found["--data.batch_size"] = str(batch)
        epochs = 3 * (len(data.dataset("train")) // data.batch_size)
        steps = int(options.steps or max(ENOUGH, min(STEPS, epochs)))
        print(f"learning rate finder: {steps} steps{', three epochs' * (steps == epochs)}", flush=True)
        finder = Tuner(self.trainer).lr_find(
            self.model, datamodule=data, min_lr=LOWEST, max_lr=HIGHEST, num_training=steps, early_stop_threshold=8.0
        )
        assert finder is not None  # only with fast_dev_run
        rates, losses = np.array(finder.results["lr"]), np.array(finder.results["loss"])
        # of Lightning's n-th mean, the first of which is half the loss, to an unbiased one; hence also the threshold
        losses *= (1 - BETA ** np.arange(2, len(losses) + 2)) / (1 - BETA ** np.arange(1, len(losses) + 1))
        rate, reason = suggest(rates, losses, self._chance())
        if rate is not None:
            found["--model.lr"] = f"{rate:.0e}"
        plot = Path(options.plot or files.unused(self.runs_root / data.run_name / "lr-finder.png"))
        with files.replacing(plot, "wb") as stream:
            figures.rate_finder(rates, losses, rate).savefig(stream, dpi=120, format="png")
        pairs, replaced = itertools.pairwise(["", *self.argv]), {"--steps", "--plot", *found}
        words = [word for before, word in pairs if not replaced & {before, word.partition("=")[0]}]
        print(f"learning rate: {reason}; see {plot}\nnext: {command('fit', *words, *itertools.chain(*found.items()))}")

    def _chance(self) -> float:
        """The loss of a network to which all classes are equally likely."""
        model, classes = self.model, len(self.model.class_names)
        label = torch.arange(classes, device=model.device)
        logits = torch.zeros(classes, classes, device=model.device)
        return float(model.loss(logits, label, None, model.hparams["label_smoothing"])) / classes

    def _batch_size(self) -> int | None:
        """The smallest batch within 5 % of the best speed, of those that fit and leave an epoch its steps."""
        rows = len(self.datamodule.dataset("train"))
        speed: dict[int, float] = {}
        for size in (size for size in BATCH_SIZES if size * EPOCH_STEPS <= rows):
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
        model = self.model.to(self.trainer.strategy.root_device).train()
        groups = [{"params": list(model.network.parameters()), "lr": 0.0}]  # no weight changes
        optimizer = make_optimizer(model.hparams["optimizer"], groups, fused=self.trainer.precision != "16-mixed")
        set_mode([optimizer], "train")
        with self.trainer.precision_plugin.forward_context():
            return size / seconds_per_step(model.network, optimizer, size, self.datamodule.image_size)


def suggest(rates: np.ndarray[Any, Any], losses: np.ndarray[Any, Any], chance: float) -> tuple[float | None, str]:
    """A tenth of the rate (N,) with the lowest smoothed loss (N,), and a sentence; None where its fall may be noise.

    So it may be where it does not lead below the loss of `chance`, to which it also falls where a network dies.
    """
    finite = np.isfinite(losses)
    rates, losses = rates[finite], losses[finite]
    if len(losses) < ENOUGH * 2 / 3:
        return None, f"cannot tell: {len(losses)} losses are too few; give more --steps"
    third = len(losses) // 3  # at these rates nothing is learned yet
    early = losses[third // 3 : third]  # the first few are means of few
    start, noise = np.median(early), early.std()
    lowest = third + losses[third:].argmin()
    if min(start, chance) - losses[lowest] < max(4 * noise, 0.03 * abs(start)):
        return None, "cannot tell: the loss falls by no more than chance; keep the default or add --steps"
    rate = float(f"{rates[lowest] / 10:.0e}")
    where = f"{rates[lowest]:.1e}, where the loss is lowest ({losses[lowest]:.3f}, {start:.3f} before)"
    return rate, f"{rate:.0e}, a tenth of {where}, rounded to one digit"
