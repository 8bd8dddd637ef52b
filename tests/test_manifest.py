import csv
import hashlib
import os
import shutil

import numpy as np
import pytest

from project.data import folders
from project.data.manifest import SPLITS, load
from project.errors import UserError
from tests.conftest import make_pictures


def split_of(rows):
    return dict(zip(rows.paths, (SPLITS[s] for s in rows.splits), strict=True))


def test_folder_is_split_70_10_20_within_each_class(tmp_path):
    rows = load(make_pictures(tmp_path, {"a": 100, "b": 20, "c": 3}))
    counts = {name: np.bincount(rows.labels[rows.rows(name)]).tolist() for name in SPLITS}
    assert counts == {"train": [70, 14, 1], "val": [10, 2, 1], "test": [20, 4, 1]}
    assert rows.class_names == ["a", "b", "c"]


def test_split_is_the_order_of_sha256_of_seed_and_path(tmp_path):
    rows = load(make_pictures(tmp_path, {"a": 10, "b": 10}), seed=7)
    paths = [f"a/{n:03d}.png" for n in range(10)]
    order = sorted(paths, key=lambda p: hashlib.sha256(f"7/{p}".encode()).digest())
    assert [split_of(rows)[p] for p in order] == ["test"] * 2 + ["val"] + ["train"] * 7


def test_split_depends_on_nothing_but_names_and_seed(tmp_path, monkeypatch):
    first = load(make_pictures(tmp_path / "one", {"a": 30, "b": 30}))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    entries = folders.entries
    monkeypatch.setattr(folders, "entries", lambda folder: entries(folder)[::-1])
    assert split_of(load(tmp_path / "two")) == split_of(first)
    assert split_of(load(tmp_path / "two", seed=1)) != split_of(first)


def test_split_folders_are_taken_as_they_are(tmp_path):
    for name, count in (("train", 5), ("validation", 2), ("test", 3)):
        make_pictures(tmp_path / name, {"a": count, "b": count})
    rows = load(tmp_path)
    assert [len(rows.rows(name)) for name in SPLITS] == [10, 4, 6]
    assert split_of(rows)["validation/a/000.png"] == "val"


def test_missing_val_is_carved_from_train_and_missing_test_is_said(tmp_path):
    make_pictures(tmp_path / "train", {"a": 20, "b": 20})
    rows = load(tmp_path)
    assert [len(rows.rows(name)) for name in SPLITS] == [36, 4, 0]
    assert any("no val" in notice for notice in rows.notices)
    assert any("no test" in notice for notice in rows.notices)


def test_split_folders_may_be_capitalised(tmp_path):
    for name in ("Train", "VAL", "Test"):
        make_pictures(tmp_path / name, {"a": 4, "b": 4})
    assert [len(load(tmp_path).rows(name)) for name in SPLITS] == [8, 8, 8]


def test_a_class_called_train_is_a_class(tmp_path):
    rows = load(make_pictures(tmp_path, {"bus": 10, "train": 10}))
    assert rows.class_names == ["bus", "train"]


def test_pictures_below_class_folders_belong_to_the_class(tmp_path):
    make_pictures(tmp_path, {"a": 5, "b": 5})
    make_pictures(tmp_path / "a" / "monday", {"camera 1": 2})
    rows = load(tmp_path)
    assert "a/monday/camera 1/000.png" in rows.paths
    assert np.bincount(rows.labels).tolist() == [7, 5]


def test_hidden_files_non_images_and_empty_classes_are_reported_not_trained_on(tmp_path):
    make_pictures(tmp_path, {"a": 5, "b": 5, ".ipynb_checkpoints": 5})
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loose.png").write_bytes(b"")
    rows = load(tmp_path)
    assert len(rows.paths) == 10
    assert rows.class_names == ["a", "b"]
    said = " | ".join(rows.notices)
    for name in (".ipynb_checkpoints", "a/.hidden.png", "a/notes.txt", "empty", "loose.png"):
        assert name in said


def test_linked_folders_are_followed_once(tmp_path):
    make_pictures(tmp_path / "data", {"a": 5, "b": 5})
    make_pictures(tmp_path / "elsewhere", {"more": 3})
    (tmp_path / "data" / "a" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data" / "a")
    assert np.bincount(load(tmp_path / "data").labels).tolist() == [8, 5]


def test_split_file_gives_the_same_rows_again(tmp_path):
    root = make_pictures(tmp_path / "photos", {"a": 20, "b": 20})
    rows = load(root, seed=3)
    rows.write_split(tmp_path / "split.csv")
    make_pictures(root, {"a": 22, "b": 20})  # two more of a
    again = load(root, tmp_path / "split.csv")
    assert split_of(again) == split_of(rows)
    assert again.labels.tolist() == rows.labels.tolist()
    assert any("2 pictures" in notice and "left out" in notice for notice in again.notices)


def test_split_file_has_path_label_and_split_of_every_row(tmp_path):
    load(make_pictures(tmp_path / "photos", {"a": 3, "ü,ß": 3})).write_split(tmp_path / "split.csv")
    with (tmp_path / "split.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["label"] for row in rows} == {"a", "ü,ß"}
    assert {row["split"] for row in rows} == set(SPLITS)


def refusal(root, **options):
    with pytest.raises(UserError) as caught:
        load(root, **options)
    return str(caught.value)


def test_class_with_fewer_than_three_pictures_is_named(tmp_path):
    assert "rare (2)" in refusal(make_pictures(tmp_path, {"a": 9, "rare": 2}))


def test_class_missing_from_a_split_lists_both_sides(tmp_path):
    make_pictures(tmp_path / "train", {"a": 4, "b": 4})
    make_pictures(tmp_path / "val", {"a": 4, "c": 4})
    said = refusal(tmp_path)
    assert "only in train: b" in said
    assert "only in val: c" in said


def test_class_name_that_is_not_utf8_is_refused(tmp_path):
    make_pictures(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "b").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    assert "not UTF-8" in refusal(tmp_path)


def test_val_and_valid_together_are_refused(tmp_path):
    for name in ("train", "val", "valid"):
        make_pictures(tmp_path / name, {"a": 4, "b": 4})
    assert "both val and valid" in refusal(tmp_path)


def test_splits_without_train_are_not_mistaken_for_classes(tmp_path):
    for name in ("val", "test"):
        make_pictures(tmp_path / name, {"a": 4, "b": 4})
    assert "no train" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\na,b\n", "no column split"),
        ("path,label,split\na,b,tran\n", "tran"),
        ("path,label,split\na,b\n", "line 2, has no split"),
        ("path,label,split\na,b,val\na,b,test\n", "more than once"),
    ],
)
def test_unusable_split_file_says_why(tmp_path, text, said):
    make_pictures(tmp_path / "photos", {"a": 4, "b": 4})
    (tmp_path / "split.csv").write_text(text)
    assert said in refusal(tmp_path / "photos", split=tmp_path / "split.csv")
