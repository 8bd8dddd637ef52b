"""metrics.csv and event files: appended whole, and cut back to the rows of a checkpoint."""

import csv
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import runs
from project.training.loggers import MetricsFile, loggers
from project.training.loop_state import LoopState
from project.training.resume import Run
from tests.conftest import read_csv


@pytest.fixture
def run(workplace):
    run = Path("runs/it/version_0")
    run.mkdir(parents=True)
    return run


def test_rows_are_there_after_each_call_also_when_columns_come_later_or_the_file_is_opened_anew(run):
    for step, metrics in enumerate([{"a": 1.0}, {"a": 2.0}, {"b/c": 3.0}, {"a": 4.0, "b/c": 5.0}]):
        file = MetricsFile(run / "metrics.csv")
        file.log_metrics(metrics, step)
        assert len(read_csv(run / "metrics.csv")) == file.rows == step + 1
    later = [{"a": "", "b/c": "3.0", "step": "2"}, {"a": "4.0", "b/c": "5.0", "step": "3"}]
    assert read_csv(run / "metrics.csv")[2:] == later
    assert [p.name for p in run.iterdir()] == ["metrics.csv"]


def test_full_disk_leaves_no_part_of_a_row(run, monkeypatch):
    file = MetricsFile(run / "metrics.csv")
    file.log_metrics({"a": 0.5}, 0)

    def write_a_part(self, *_):
        with (run / "metrics.csv").open("a") as stream:
            stream.write("0.7")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerow", write_a_part)
    with pytest.raises(OSError, match="No space left"):
        file.log_metrics({"a": 0.75}, 1)
    assert read_csv(run / "metrics.csv") == [{"a": "0.5", "step": "0"}]


def test_row_that_was_cut_off_is_left_out(run):
    (run / "metrics.csv").write_text("a,step\r\n1,0\r\n2,")
    assert runs.read_metrics(run / "metrics.csv") == (["a", "step"], [{"a": "1", "step": "0"}])


def test_a_resumed_fit_shows_each_point_once(run):
    for first, loss in ((0, 1.0), (3, 2.0)):
        for events in run.glob("events.*"):
            events.rename(run / "events.out.tfevents.0")  # earlier, in the order of names
        part = Run(run, None, None, LoopState(step=first, rows=first), resumed=first > 0)
        board, file = loggers(part)
        part.begin({}, run.parent)
        for step in range(first, 5):
            file.log_metrics({"loss": loss}, step)
            board.log_metrics({"loss": loss}, step)
        board.experiment.close()
    assert [row["loss"] for row in read_csv(run / "metrics.csv")] == ["1.0"] * 3 + ["2.0"] * 2
    points = EventAccumulator(str(run)).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]
