"""metrics.csv and event files: appended whole, and cut back to the rows of a checkpoint."""

import csv
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from project import runs
from project.training import loggers
from project.training.loggers import MetricsFile

RUN = Path("runs/it/version_0")


@pytest.fixture
def run(workplace):
    RUN.mkdir(parents=True)
    return RUN


def rows():
    with (RUN / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(stream)]


def test_rows_are_there_after_each_save_also_when_columns_come_later(run):
    file = MetricsFile(run)
    for step, metrics in enumerate([{"a": 1.0}, {"a": 2.0}, {"b/c": 3.0}, {"a": 4.0, "b/c": 5.0}]):
        file.log_metrics(metrics, step)
        file.save()
        assert len(rows()) == step + 1
    assert rows()[2:] == [{"b/c": "3.0", "step": "2"}, {"a": "4.0", "b/c": "5.0", "step": "3"}]
    assert [p.name for p in run.iterdir()] == ["metrics.csv"]


def test_file_that_is_there_is_continued(run):
    for part in range(2):
        file = MetricsFile(run)
        file.log_metrics({"a": part}, part)
        file.save()
        assert file.rows == part + 1
    assert [row["a"] for row in rows()] == ["0", "1"]


def test_rows_wait_while_the_disk_is_full_and_none_is_lost_or_torn(run, monkeypatch, capsys):
    file = MetricsFile(run)
    file.log_metrics({"a": 0.5}, 0)
    file.save()
    with monkeypatch.context() as full:

        def write_a_part(self, mode="r", **_):
            stream = open(self, mode, encoding="utf-8", newline="")  # noqa: SIM115, PTH123
            write = stream.write

            def fail(text):
                write(text[: len(text) // 2])
                raise OSError(28, "No space left on device")

            stream.write = fail
            return stream

        full.setattr(Path, "open", write_a_part)
        for step in (1, 2):
            file.log_metrics({"a": float(step)}, step)
            file.save()
    file.log_metrics({"a": 3.0}, 3)
    file.save()
    assert [row["step"] for row in rows()] == ["0", "1", "2", "3"]
    assert capsys.readouterr().out.count("wait until they can be written") == 1


def test_row_that_was_cut_off_is_left_out(run):
    (run / "metrics.csv").write_text("a,step\r\n1,0\r\n2,")
    assert runs.read_metrics(run / "metrics.csv") == (["a", "step"], [{"a": "1", "step": "0"}])


def test_a_resumed_fit_shows_each_point_once(run):
    file, board = MetricsFile(run), loggers.tensorboard_logger(run)
    for step in range(5):
        file.log_metrics({"loss": 1.0}, step)
        board.log_metrics({"loss": 1.0}, step)
    file.save()
    board.experiment.close()
    (events,) = run.glob("events.*")
    events.rename(run / "events.out.tfevents.0")  # earlier, in the order of names
    loggers.truncate(run, 3)
    resumed, again = MetricsFile(run), loggers.tensorboard_logger(run, purge_step=3)
    for step in (3, 4):
        resumed.log_metrics({"loss": 2.0}, step)
        again.log_metrics({"loss": 2.0}, step)
    resumed.save()
    again.experiment.close()
    assert [row["loss"] for row in rows()] == ["1.0"] * 3 + ["2.0"] * 2
    points = EventAccumulator(str(run)).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(0, 1), (1, 1), (2, 1), (3, 2), (4, 2)]
