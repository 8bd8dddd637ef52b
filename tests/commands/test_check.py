"""Dataset checks: what they find, and that they change nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from project import cli
from project.data.check import check_dataset
from project.data.duplicates import near_groups
from project.data.workers import usable_cores
from project.evaluation import figures
from tests.conftest import COLOURS, SMALL, make_images, read_csv


def scenery(seed, size=(96, 128)):
    """A smooth image with large shapes: what survives a JPEG."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize(size[::-1], Image.Resampling.BICUBIC)


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def kinds(report):
    return {finding.kind: finding for finding in report.findings}


@pytest.fixture
def sick(photos):
    """photos/ with one of everything."""
    for number in range(30):
        scenery(number).save(photos / "red" / f"scene{number:02d}.png")
    (photos / "red" / "000.png").write_bytes((photos / "red" / "000.png").read_bytes()[:300])
    (photos / "red" / "page.jpg").write_text("<html>not found</html>")
    (photos / "blue" / "copy.png").write_bytes((photos / "blue" / "005.png").read_bytes())
    (photos / "green" / "other label.png").write_bytes((photos / "blue" / "006.png").read_bytes())
    scenery(3).resize((80, 60)).convert("RGB").save(photos / "red" / "again.jpg", quality=70)
    scenery(99).save(photos / "blue" / "really a png.jpg", "PNG")
    Image.new("RGB", (40, 30), "white").save(photos / "green" / "white.png")
    scenery(101).save(photos / "red" / "phone.jpg", "MPO", save_all=True, append_images=[scenery(102)])  # a phone's
    exif = Image.Exif()
    exif[0x0112] = 6
    scenery(100).save(photos / "green" / "turned.jpg", exif=exif)
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 65536, (30, 40), dtype=np.uint16)).save(photos / "red" / "deep.png")
    Image.fromarray(random.integers(0, 256, (20, 400, 3), dtype=np.uint8)).save(photos / "red" / "long.png")
    (photos / "empty").mkdir()
    (photos / "notes.txt").write_text("x")
    (photos / ".ipynb_checkpoints").mkdir()
    return photos


@pytest.mark.slow
def test_everything_is_found_named_and_nothing_is_changed_and_fit_leaves_out_what_is_quarantined(sick, capsys):
    before = contents(sick)
    assert cli.main(["check", str(sick), "--json", "all.json", "--quarantine", "out.csv"]) == 1
    assert contents(sick) == before
    out = capsys.readouterr().out
    findings = json.loads(Path("all.json").read_text())["findings"]
    found = {finding["kind"]: finding["paths"] for finding in findings}
    paths = {kind: " ".join(path for entry in entries for path in entry) for kind, entries in found.items()}
    assert "red/000.png: " in paths["unreadable"]
    assert "red/page.jpg: not an image" in paths["unreadable"]
    assert paths["duplicate-label"] == "blue/006.png green/other label.png"
    reasons = {row["path"]: row["reason"] for row in read_csv("out.csv")}
    assert reasons["blue/006.png"].endswith(": green/other label.png")  # each names the other, never itself
    assert reasons["green/other label.png"].endswith(": blue/006.png")
    assert (paths.get("duplicate") or paths["duplicate-split"]) == "blue/005.png blue/copy.png"
    near = [entries for kind, entries in found.items() if kind.startswith("near-duplicate")]
    assert near == [[["red/again.jpg", "red/scene03.png"]]]
    assert paths["ending"] == "blue/really a png.jpg"
    assert paths["constant"] == "green/white.png"
    assert paths["rotated"] == "green/turned.jpg"
    assert paths["deep"] == "red/deep.png"
    assert "red/long.png" in paths["aspect"]
    for name in ("empty", "notes.txt", ".ipynb_checkpoints"):
        assert name in out
    problems = [finding["problem"] for finding in findings]
    assert problems == sorted(problems, reverse=True)  # worst first
    listed = {row["path"] for row in read_csv(Path("out.csv"))}
    assert {"red/000.png", "red/page.jpg", "blue/006.png", "green/other label.png"} < listed
    assert len({"blue/005.png", "blue/copy.png"} & listed) == 1  # one of the two stays
    assert len({"red/again.jpg", "red/scene03.png"} & listed) == 1
    fit = ["fit", "--data.root", str(sick), "--data.exclude", "out.csv", *SMALL, "--trainer.max_epochs", "1"]
    assert cli.main(fit) == 0
    out = capsys.readouterr().out
    assert f"listed in out.csv: {len(listed)} of {len(listed)} paths" in out
    assert "unreadable" not in out
    run = Path("runs/photos/version_0")
    assert not {row["path"] for row in read_csv(run / "split.csv")} & listed
    assert "exclude: out.csv" in (run / "config.yaml").read_text()
    Path("out.csv").unlink()
    assert cli.main(["test"]) == 0  # the run's split.csv is enough


def test_clean_folder_has_no_findings_and_a_preview_shows_what_training_and_validation_see(photos, capsys):
    preview = ["--preview", "preview.png", "--augment", "crop", "--image_size", "64"]
    assert cli.main(["check", str(photos), "--json", "all.json", *preview]) == 0
    found, pixels = json.loads(Path("all.json").read_text()), [np.asarray(Image.open(p)) for p in photos.rglob("*.png")]
    assert found["mean"] == pytest.approx(np.mean(pixels, axis=(0, 1, 2)) / 255, abs=0.005)
    assert found["std"] == pytest.approx(np.std(pixels, axis=(0, 1, 2)) / 255, abs=0.005)
    out = capsys.readouterr().out
    assert "problems:\n  none" in out
    assert "\n  The mean of the pixels is 0." in out
    assert "green         28          4          8" in out
    with Image.open("preview.png") as image:  # six training images three times, then six validation images
        assert image.size == (1188, round((1.1 * 1.5 + 0.6) * 4 * 120))
        assert len(image.convert("RGB").getcolors(10**7)) > 1000


def test_preview_of_few_images_shows_every_class(workplace, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "image_grid", lambda images, titles, **_: shown.extend(titles) or figures.Figure())
    make_images(Path("few"), dict.fromkeys(COLOURS, 30))
    cli.main(["check", "few", "--preview", "few.png"])
    assert {(title.split()[0], title.split()[-2]) for title in shown} == {
        (colour, split) for colour in COLOURS for split in ("train,", "val,")
    }


def test_preview_names_each_image_and_its_class_and_shows_other_ways_to_resize_on_request(photos, monkeypatch):
    photos.joinpath("red").rename(photos / ("red " * 20).strip())
    shown, draw = [], figures.image_grid
    monkeypatch.setattr(figures, "image_grid", lambda *args, **named: shown.append(args[1]) or draw(*args, **named))
    for resize, ways in (
        (["--resize", "crop"], {"crop"}),
        (["--resize", "pad:nearest"], {"pad:nearest"}),
        ([], {"stretch"}),
        (["--resize", "all"], {"stretch", "crop", "pad"}),
    ):
        assert cli.main(["check", str(photos), "--preview", f"{len(shown)}.png", *resize]) == 0
        titles = [title.split("\n") for title in shown[-1]]
        assert {lines[-1] for lines in titles} == {f"{split}, {way}" for split in ("train", "val") for way in ways}
        assert {lines[0] for lines in titles} == {"blue", "green", "red red red red"}
        assert all((photos / lines[0] / lines[1]).is_file() for lines in titles if lines[0] in COLOURS)


def test_unknown_resize_is_refused_before_anything_is_read(refused):
    assert refused("check", "nowhere", "--resize", "crop:cubic").startswith("There is no resize crop:cubic; give")


def test_small_unequal_and_differing_classes_are_findings(workplace):
    found = kinds(check_dataset(make_images(Path("p"), {"many": 200, "few": 6})))
    assert found["small-class"].paths == [["few: 4"]]
    assert found["small-class"].sentence == "There is 1 class with fewer than 10 training images."
    assert "many has 35 times as many images as few" in found["imbalance"].sentence
    make_images(Path("q/train"), {"cat": 12, "dog": 12})
    make_images(Path("q/val"), {"cat": 4, "owl": 4}, seed=1)
    finding = kinds(check_dataset(Path("q")))["refused"]
    assert finding.problem
    assert "only in train: dog; only in val: owl" in finding.sentence


def test_a_line_break_in_the_name_of_a_class_does_not_break_the_table(workplace, capsys):
    make_images(Path("p"), {"a\n|b\t": 6, "plain": 20})
    assert cli.main(["check", "p"]) == 1
    assert "\na\\n|b\\t " in (out := capsys.readouterr().out)
    assert "    a\\n|b\\t: 4\n" in out


def test_layout_bad_links_and_passed_over_folders_are_reported_as_fit_reads_them(workplace, refused):
    make_images(Path("p"), {"cat": 15, "test": 15, "#recycle": 15})
    Path("p/cat/loop").symlink_to("..")
    assert "classes cat, test; or as splits, test" in refused("check", "p")
    report = ["check", "p", "--layout", "classes", "--json"]
    assert cli.main([*report, "all.json"]) == 1
    found = json.loads(Path("all.json").read_text())
    assert list(found["classes"]) == ["cat", "test"]
    left_out = {f["sentence"]: f["problem"] for f in found["findings"] if f["kind"] == "skipped"}
    assert left_out.pop("There is 1 path left out: link to a folder above it.")
    assert list(left_out.values()) == [False]
    Path("p/cat/loop").unlink()
    assert cli.main([*report, "kept.json", "--keep", "#recycle"]) == 0
    assert list(json.loads(Path("kept.json").read_text())["classes"]) == ["#recycle", "cat", "test"]


def test_copies_on_both_sides_of_the_split_are_found_and_the_training_image_goes(workplace):
    for folder, first in (("train/a", 0), ("train/b", 50), ("val/a", 100), ("val/b", 150)):
        Path("p", folder).mkdir(parents=True)
        for number in range(12):
            scenery(first + number).save(Path("p", folder, f"{number}.png"))
    Path("p/val/b/copy.png").write_bytes(Path("p/train/b/3.png").read_bytes())
    scenery(300).save("p/train/a/x.png")
    Path("p/val/a/copy.png").write_bytes(Path("p/train/a/x.png").read_bytes())
    scenery(300).convert("RGB").save("p/train/a/saved again.jpg", quality=70)
    report = check_dataset(Path("p"))
    assert kinds(report)["duplicate-split"].paths == [["train/b/3.png", "val/b/copy.png"]]
    near = ["train/a/saved again.jpg", "train/a/x.png", "val/a/copy.png"]  # a copy of a nearly same image, too
    assert kinds(report)["near-duplicate-split"].paths == [near]
    assert set(report.leave_out) == {"train/b/3.png", *near[:2]}  # the test stays as hard as it was


def test_near_groups_are_those_of_all_comparisons():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(3000, 32))
    vectors[1500:1600] = vectors[:100] + random.normal(size=(100, 32)) * 0.04
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    stored = vectors.astype(np.float16)
    correlation = stored.astype(np.float32) @ stored.astype(np.float32).T
    expected = [list(pair) for pair in zip(*np.nonzero(np.triu(correlation >= 0.998, 1)), strict=True)]
    assert len(expected) > 50
    assert near_groups(stored) == expected
    assert near_groups(stored[:1]) == []
    angles = np.concatenate([np.linspace(0, 0.5, 20), [2.0], np.full(3000, 3.0)])  # cos(0.5 / 19) is above 0.998
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    assert sorted(map(len, near_groups(circle))) == [20, 3000]  # linked through others; many alike


def test_a_class_without_a_readable_image_comes_first_and_no_data_values_are_told(photos, capsys):
    make_images(photos, {"phone": 20})
    for file in (photos / "phone").iterdir():
        file.write_bytes(b"no image")
    values = np.random.default_rng(0).random((30, 40), dtype=np.float32)
    values[3, 3] = -9999
    Image.fromarray(values).save(photos / "red" / "heights.tif")
    assert cli.main(["check", str(photos)]) == 1
    lines = capsys.readouterr().out.split("problems:\n")[1].splitlines()
    assert lines[0].strip() == "There are 3 splits in which a class has no readable image."
    assert lines[1].strip().startswith("phone (test): phone/0")
    assert kinds(check_dataset(photos))["no-data"].paths == [["red/heights.tif"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_worker", "code"),
    [(signal.SIGKILL, True, 1), (signal.SIGINT, False, 130), (signal.SIGTERM, False, -signal.SIGTERM)],
)
def test_lost_process_is_a_sentence_and_a_signal_leaves_none(workplace, number, to_worker, code):
    make_images(Path("many"), {"a": 3000, "b": 3000})
    words = [sys.executable, "-m", "project.cli", "check", "many"]
    process = psutil.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    ready = [False]
    while ready != [True] * usable_cores():  # each has started its thread, and listens to no Ctrl-C from then on
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
        workers = process.children(recursive=True)
        ready = [worker.num_threads() > 1 for worker in workers]
    if to_worker:
        workers[0].send_signal(number)
    else:
        os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in said
    assert ("failed: A process that reads images was killed" in said) == to_worker
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
