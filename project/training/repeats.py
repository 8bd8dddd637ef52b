"""fit --seeds 5 and fit --folds 5: as many ordinary fits and tests, then mean and deviation of their figures.

Each is the command that a user would give, in a process of its own: its memory is free at its end, the other ranks of a
distributed fit, which Lightning starts with the command line of the process, get that of one fit, and a signal saves
and ends it as any fit. No state is kept: the same command skips finished runs and resumes an unfinished one.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

from project import files, runs
from project.errors import UserError, some
from project.evaluation import report, results, scores
from project.inference.load import locate
from project.training import resume, signals
from project.training.checkpoint_io import BEST
from project.training.cli import Cli
from project.training.resume import Run

LAUNCHERS = {"torchrun": "WORLD_SIZE", "srun": "SLURM_NTASKS"}  # whose processes would each repeat the fit


class _Planned(Exception):
    """The options of a fit are complete."""


class RepeatCli(Cli):
    """fit, validate and test; with --seeds or --folds, fit starts itself and test several times."""

    is_plan = False  # whether a fit ends before it makes its run

    def find_run(self, options: Any) -> Run | None:
        if not (options.seeds or options.folds):
            return super().find_run(options)
        _require_usable(options)
        raise SystemExit(self._repeat(options))

    def new_run(self) -> Run:
        if self.is_plan:
            raise _Planned
        return super().new_run()

    def _repeat(self, options: Any) -> int:
        """Fits and tests what is not finished, and prints the figures of all; returns the exit code."""
        os.environ.pop("SLURM_RESTART_COUNT", None)  # of a requeued job, whose unfinished run is found here
        self.is_plan, argv, seed, done = True, self.argv, options.seed_everything, dict[str, Path]()
        repeats = {f"seed {seed + n}": [f"--seed_everything={seed + n}"] for n in range(options.seeds or 0)}
        for fold in range(options.folds or 0):
            repeats[f"fold {fold}"] = [f"--data.folds={options.folds}", f"--data.fold={fold}"]
        kept = f"seed {seed}" if options.folds else f"split (--data.split_seed {options.data.get('split_seed', 0)})"
        first, *_, last = repeats
        print(f"{len(repeats)} fits and tests, {first} to {last}, all with the same {kept}")
        for name, words in repeats.items():
            self.argv, code = [*argv, "--seeds=null", "--folds=null", *words], 0
            folder = self._plan()
            run = resume.same(folder, self.recorded, self.datamodule)
            is_finished = run is not None and runs.read_status(run).get("state") == "finished"
            print(f"\n{name}{f': {run} is finished' * is_finished}", flush=True)
            if not is_finished:
                code = signals.run_child(["fit", *(["--resume", str(run)] if run else []), *self.argv])
                run = resume.same(folder, self.recorded, self.datamodule)
            if run and not code and not results.is_tested(run / "checkpoints" / BEST, str(self.datamodule.root)):
                device = [f"--trainer.{key}={self.recorded['trainer'][key]}" for key in ("accelerator", "devices")]
                code = signals.run_child(
                    ["test", "--ckpt_path", str(run), *device, *(f"--trust={path}" for path in self.trust)]
                )
            if code or not run:
                print(f"ended at {name}; the same command continues there")
                return code or 1
            done[name] = run
        _summarize(done, self.trust)
        return 0

    def _plan(self) -> Path:
        """Parses and checks the options of one fit as it does itself; returns the folder of its run."""
        self.parse_arguments(self.parser, None)
        with contextlib.suppress(_Planned):
            self.instantiate_classes()
        del self.model, self.config_init  # the network's memory
        self.datamodule.setup("test")  # its errors, before the fit
        return self.runs_root / (self.config.fit.name or self.datamodule.run_name)


def _require_usable(options: Any) -> None:
    """Raises UserError where --seeds or --folds has no deviation, or beside options that it sets or cannot go with."""
    option, number = ("--folds", options.folds) if options.folds else ("--seeds", options.seeds)
    values = {f"--{name}": options[name] for name in ("resume", "ckpt_path", "trainer.fast_dev_run")}
    values |= {"--trainer.enable_checkpointing": options.trainer.enable_checkpointing is False}
    values |= {launcher: int(os.environ.get(name) or 1) > 1 for launcher, name in LAUNCHERS.items()}
    if options.folds:
        if "folds" not in options.data:
            raise UserError(f"--folds needs the splits of ImageData, which {options.data.class_path} does not have.")
        values |= {f"--{name}": options[name] for name in ("seeds", "data.folds", "data.fold")}
    if given := [name for name, value in values.items() if value is not None and value is not False]:
        raise UserError(f"{option} makes and tests whole runs, one after another; leave {some(given)} out.")
    if number == 1:
        raise UserError(f"{option} 1 is one run, which has no deviation; give at least 2.")


def _summarize(done: dict[str, Path], trust: set[str]) -> None:
    """Prints the figures of all runs, and writes them, for folds with a report, into a folder beside those of runs."""
    run, unit = next(iter(done.values())), next(iter(done)).split()[0]
    sources = {name: locate(path, trust) for name, path in done.items()}
    tested = {name: results.gather(source, source.load(device="cpu")) for name, source in sources.items()}
    folder = run.parent.with_name(f"{run.parent.name.removesuffix('-fold0')}-{len(done)}-{unit}s") / run.name
    table = results.table(tested)
    pooled = results.pool(tested, folder / runs.PREDICTIONS) if unit == "fold" else None
    whole = results.all_scores(pooled.scored, {}) if pooled else {}
    paths = {name: str(path) for name, path in done.items()}
    files.write_json(folder / "figures.json", {"figures": table, "pooled": whole, "runs": paths})
    rows = [[name, *row.values()] for name, row in table.items()]
    files.write_csv(folder / "figures.csv", [["figure", "mean", "sd", *done], *rows])
    print(f"\ntest figures of {len(done)} runs, mean ± standard deviation:")
    for name, row in table.items():
        mean, deviation = (scores.format_score(name, row[kind]) for kind in ("mean", "sd"))
        print(f"  {scores.NAMES.get(name, name):14}{mean} ± {deviation}")
    print(f"written: {folder}/figures.csv, {folder}/figures.json")
    if pooled:
        print(f"pooled predictions: {scores.format_scores(whole)}")
        print(f"report: {report.write(sources['fold 0'], pooled=pooled)}")
