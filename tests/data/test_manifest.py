import csv
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from project.data import folders
from project.data.manifest import SPLITS, load
from project.errors import UserError
from tests.conftest import make_images

GROUP = r"p\d+"


def split_of(rows):
    return dict(zip(rows.paths, (SPLITS[s] for s in rows.splits), strict=True))


def sizes(rows):
    return [len(rows.rows(name)) for name in SPLITS]


def refusal(root, **options):
    with pytest.raises(UserError) as caught:
        load(root, **options)
    return str(caught.value)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def grouped(root, groups=12, splits=("",)):
    random = np.random.default_rng(0)
    for part in splits:
        for label in "abc":
            for group in range(groups):
                touch(root / part / label, *(f"p{group:02d}_{n}.png" for n in range(int(random.integers(1, 9)))))
    return root


def sides(rows):
    found = {}
    for path, split in split_of(rows).items():
        found.setdefault(Path(path).name.split("_")[0], set()).add(split)
    return found


def test_each_class_is_split_70_10_20_in_the_order_of_sha256_of_seed_and_path(tmp_path):
    rows = load(make_images(tmp_path, {"a": 100, "b": 10, "c": 3}), seed=7)
    counts = {name: np.bincount(rows.labels[rows.rows(name)]).tolist() for name in SPLITS}
    assert counts == {"train": [70, 7, 1], "val": [10, 1, 1], "test": [20, 2, 1]}
    assert rows.class_names == ["a", "b", "c"]
    order = sorted((f"b/{n:03d}.png" for n in range(10)), key=lambda p: hashlib.sha256(f"7/{p}".encode()).digest())
    assert [split_of(rows)[path] for path in order] == ["test"] * 2 + ["val"] + ["train"] * 7


def test_split_depends_on_nothing_but_names_and_seed(tmp_path, monkeypatch):
    first = load(make_images(tmp_path / "one", {"a": 30, "b": 30}))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    entries = folders.entries
    monkeypatch.setattr(folders, "entries", lambda folder: entries(folder)[::-1])
    assert split_of(load(tmp_path / "two")) == split_of(first)
    assert split_of(load(tmp_path / "two", seed=1)) != split_of(first)


def test_split_folders_are_taken_as_they_are(tmp_path):
    for name, count in {"Train": 5, "validation": 2, "TEST": 3}.items():
        make_images(tmp_path / name, {"a": count, "b": count})
    rows = load(tmp_path)
    assert sizes(rows) == [10, 4, 6]
    assert split_of(rows)["validation/a/000.png"] == "val"


def test_missing_val_is_carved_from_train_by_whole_groups_and_missing_test_is_reported(tmp_path):
    make_images(tmp_path / "plain" / "train", {"a": 20, "b": 20})
    rows = load(tmp_path / "plain")
    assert sizes(rows) == [36, 4, 0]
    assert "no val" in rows.notices[0]
    assert "no test" in rows.notices[1]
    rows = load(grouped(tmp_path / "groups", splits=("train",)), group=GROUP)
    assert {frozenset(splits) for splits in sides(rows).values()} == {frozenset({"train"}), frozenset({"val"})}


def test_images_below_class_folders_belong_to_the_class_and_everything_else_is_reported(tmp_path):
    root = make_images(tmp_path / "data", {"bus": 5, "train": 5, ".ipynb_checkpoints": 5})  # a class called "train"
    make_images(root / "bus" / "monday", {"camera 1": 2})
    make_images(tmp_path / "elsewhere", {"more": 3})
    (root / "bus" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "bus" / "loop").symlink_to(root / "bus")  # followed once
    touch(root, "bus/.hidden.png", "bus/notes.txt", "loose.png")
    (root / "empty").mkdir()
    rows = load(root)
    assert "bus/monday/camera 1/000.png" in rows.paths
    assert (rows.class_names, np.bincount(rows.labels).tolist()) == (["bus", "train"], [10, 5])
    for name in (".ipynb_checkpoints", "bus/.hidden.png", "bus/notes.txt", "empty", "loose.png"):
        assert name in " | ".join(rows.notices)


def test_split_file_gives_the_same_rows_again(tmp_path):
    root = make_images(tmp_path / "photos", {"a": 20, "ü,ß ": 20})
    touch(root, "a/ odd\\name .png")
    rows = load(root, seed=3)
    rows.write_split(tmp_path / "split.csv")
    with (tmp_path / "split.csv").open(encoding="utf-8") as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"a", "ü,ß "}
    make_images(root, {"a": 22})  # two more
    again = load(root, tmp_path / "split.csv")
    assert split_of(again) == split_of(rows)
    assert again.labels.tolist() == rows.labels.tolist()
    assert any("2 images" in notice and "left out" in notice for notice in again.notices)
    assert "split.csv is split already" in refusal(root, split=tmp_path / "split.csv", folds=3, fold=0)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"": {"a": 9, "rare": 2}}, ["rare (2)"]),
        ({"train": {"a": 4, "b": 4}, "val": {"a": 4, "c": 4}}, ["only in train: b", "only in val: c"]),
        ({"": {"a": 4, os.fsdecode(b"caf\xe9"): 4}}, ["not UTF-8"]),
        ({name: {"a": 4, "b": 4} for name in ("train", "val", "valid")}, ["both val and valid"]),
        ({name: {"a": 4, "b": 4} for name in ("val", "test")}, ["no train"]),
    ],
)
def test_unusable_folders_are_refused_with_the_reason(tmp_path, folders, expected):
    for name, classes in folders.items():
        make_images(tmp_path / name, classes)
    for part in expected:
        assert part in refusal(tmp_path)


LINES = [f"pics/{c}/{n:03d}.png,{c}" for c in "ab" for n in range(30)]
SWAPPED = [f"{line.split(',')[1]} , {line.split(',')[0]} ,x" for line in LINES]
GIVEN = [f"{line},{('Train', 'Train', 'valid', 'test')[index % 4]}" for index, line in enumerate(LINES)]


@pytest.mark.parametrize(
    ("lines", "encoding", "expected"),
    [
        (["path,label", *LINES], "utf-8", [42, 6, 12]),
        (["Label , PATH,note", *SWAPPED, ""], "utf-8-sig", [42, 6, 12]),  # any case, order and a byte order mark
        (["path,label", *(line.replace("/", "\\") for line in LINES)], "utf-8", [42, 6, 12]),  # from Windows
        (["path,label,split", *GIVEN], "utf-8", [30, 15, 15]),
    ],
)
def test_csv_file_is_read_like_a_folder(tmp_path, lines, encoding, expected):
    (tmp_path / "list.csv").write_text("\n".join(lines), encoding=encoding)
    rows = load(tmp_path / "list.csv")
    assert (rows.root, rows.class_names, sizes(rows)) == (tmp_path, ["a", "b"], expected)
    assert list(rows.paths) == [line.split(",")[0] for line in LINES]


@pytest.mark.parametrize(
    ("as_split", "text", "expected"),
    [
        (False, "file,label\na,b", "no column path; it has file, label"),
        (False, "", "no column label, path; it has nothing"),
        (False, "path,label\nx,\n", "line 2, has no label"),
        (False, "path,label\nx,a\n./y/..//x,b\n", "lists x more than once"),
        (False, "path,label,split\nx,a,train\ny,b,\n", "none for y"),
        (False, "path,label\n", "No images"),
        (False, "path,label,split\na,b,val\n", "No training images"),
        (False, "path,label\na,b\nc,b\nd,b\n", "one class, b"),
        (True, "path,label,split\na,b,tran\n", "tran"),
        (True, "path,label,split\na,b\n", "line 2, has no split"),
    ],
)
def test_unusable_csv_file_is_refused_with_the_reason(tmp_path, as_split, text, expected):
    file = tmp_path / "list.csv"
    file.write_text(text)
    if as_split:
        assert expected in refusal(make_images(tmp_path / "photos", {"a": 4, "b": 4}), split=file)
    else:
        assert expected in refusal(file)


def test_groups_stay_in_one_split_and_shares_are_nearly_kept(tmp_path):
    rows = load(grouped(tmp_path), group=GROUP)
    assert all(len(splits) == 1 for splits in sides(rows).values())
    assert any(len(splits) > 1 for splits in sides(load(tmp_path)).values())  # without --data.group they do not
    assert np.bincount(rows.splits) / len(rows.splits) == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
    assert split_of(load(tmp_path, group=r"/(p\d+)_")) == split_of(rows)
    assert split_of(load(tmp_path, group=GROUP, seed=1)) != split_of(rows)
    rows.write_split(tmp_path / "split.csv")
    again = load(tmp_path, tmp_path / "split.csv")
    assert (split_of(again), again.groups) == (split_of(rows), rows.groups)
    few = sides(load(grouped(tmp_path / "few", 3), group=GROUP))
    assert sorted(next(iter(splits)) for splits in few.values()) == sorted(SPLITS)


@pytest.mark.parametrize("group", [None, GROUP])
def test_folds_partition_the_images(tmp_path, group):
    grouped(tmp_path)
    folds = [load(tmp_path, folds=5, fold=fold, group=group) for fold in range(5)]
    tested = [path for rows in folds for path, split in split_of(rows).items() if split == "test"]
    assert sorted(tested) == list(folds[0].paths)
    for rows in folds:
        assert np.bincount(rows.splits).min() > 0
        if group:
            assert all(len(splits) == 1 for splits in sides(rows).values())
        else:
            assert np.bincount(rows.splits) / len(rows.splits) == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


def test_groups_on_both_sides_of_a_given_split_are_kept_and_reported(tmp_path):
    load(grouped(tmp_path / "photos")).write_split(tmp_path / "split.csv")
    rows = load(tmp_path / "photos", tmp_path / "split.csv", group=GROUP)
    assert set(rows.groups) == {f"p{number:02d}" for number in range(12)}
    assert any("lie on both sides" in notice for notice in rows.notices)


def test_two_folds_leave_something_to_train_on(tmp_path):
    assert "a (3)" in refusal(make_images(tmp_path / "p", {"a": 3, "b": 9}), folds=2, fold=0)
    rows = load(make_images(tmp_path / "q", {"a": 4, "b": 9}), folds=2, fold=1)
    assert min(np.bincount(rows.labels[rows.rows("train")])) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"folds": 5}, "--data.fold is None"),
        ({"folds": 5, "fold": 5}, "a fold from 0"),
        ({"folds": 1, "fold": 0}, "two folds or more"),
        ({"folds": 99, "fold": 0}, "needs at least 99"),
        ({"group": "("}, "no regular expression"),
        ({"group": "png"}, "Too few groups"),
        ({"group": r"\d*"}, "matches none of the paths; the first is a/p00_0.png"),
    ],
)
def test_impossible_split_is_refused_with_the_reason(tmp_path, options, expected):
    assert expected in refusal(grouped(tmp_path), **options)


def test_excluded_paths_are_left_out_and_counted(tmp_path):
    root = make_images(tmp_path / "photos", {"a": 20, "b": 20})
    (tmp_path / "out.csv").write_text(f"path,reason\na/003.png,bad\n{root}/a/004.png,bad\nz/1.png,gone\n")
    rows = load(root, exclude=tmp_path / "out.csv")
    assert len(rows.paths) == 38
    assert not {"a/003.png", "a/004.png"} & set(rows.paths)
    assert any("2 of 3 paths" in notice for notice in rows.notices)
