import csv
import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from project.data import folders, manifest
from project.data.manifest import SPLITS, load
from project.data.rows import Texts
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


# CSV files


def table(tmp_path, text, **options):
    make_pictures(tmp_path / "pics", {"a": 30, "b": 30})
    (tmp_path / "list.csv").write_text(text, **options)
    return tmp_path / "list.csv"


LINES = [f"pics/{c}/{n:03d}.png,{c}" for c in "ab" for n in range(30)]


def test_csv_file_is_split_like_a_folder(tmp_path):
    rows = load(table(tmp_path, "\n".join(["path,label", *LINES])))
    assert rows.root == tmp_path
    assert [len(rows.rows(s)) for s in SPLITS] == [42, 6, 12]
    assert (rows.root / rows.paths[0]).exists()


def test_csv_columns_come_in_any_case_and_order_with_a_byte_order_mark(tmp_path):
    lines = [f"{line.split(',')[1]} , {line.split(',')[0]} ,x" for line in LINES]
    rows = load(table(tmp_path, "\n".join(["Label , PATH,note", *lines, ""]), encoding="utf-8-sig"))
    assert len(rows.paths) == 60
    assert rows.class_names == ["a", "b"]


def test_csv_split_is_taken_as_it_is(tmp_path):
    names = ["Train"] * 20 + ["valid"] * 5 + ["test"] * 5
    rows = load(
        table(tmp_path, "\n".join(["path,label,split", *(f"{x},{s}" for x, s in zip(LINES, names * 2, strict=True))]))
    )
    assert [len(rows.rows(s)) for s in SPLITS] == [40, 10, 10]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,label\na,b", "no column path; it has file, label"),
        ("path\na", "no column label"),
        ("", "no column label, path; it has nothing"),
        ("path,label\nx,\n", "line 2, has no label"),
        ("path,label\nx,a\nx,b\n", "lists x more than once"),
        ("path,label,split\nx,a,train\ny,b,\n", "none for y"),
        ("path,label\n", "No pictures"),
    ],
)
def test_unusable_csv_file_says_why(tmp_path, text, said):
    (tmp_path / "list.csv").write_text(text)
    assert said in refusal(tmp_path / "list.csv")


# groups and folds


def grouped(tmp_path, groups=12):
    root = tmp_path / "photos"
    random = np.random.default_rng(0)
    for label in "abc":
        for group in range(groups):
            for number in range(int(random.integers(1, 9))):
                (root / label).mkdir(parents=True, exist_ok=True)
                (root / label / f"p{group:02d}_{number}.png").touch()
    return root


def sides(rows):
    found = {}
    for path, split in split_of(rows).items():
        found.setdefault(path.split("/")[1].split("_")[0], set()).add(split)
    return found


def test_groups_stay_on_one_side_and_shares_are_nearly_kept(tmp_path):
    root = grouped(tmp_path)
    rows = load(root, group=r"/(p\d+)_")
    assert all(len(splits) == 1 for splits in sides(rows).values())
    assert any(len(splits) > 1 for splits in sides(load(root)).values())  # which it does not without
    shares = np.bincount(rows.splits) / len(rows.splits)
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
    assert split_of(load(root, group=r"/(p\d+)_")) == split_of(rows)
    assert split_of(load(root, group=r"/(p\d+)_", seed=1)) != split_of(rows)


def test_few_groups_still_reach_every_split(tmp_path):
    rows = load(grouped(tmp_path, groups=3), group=r"p\d+")
    assert sorted(next(iter(s)) for s in sides(rows).values()) == ["test", "train", "val"]


def test_groups_are_written_with_the_split_and_read_again(tmp_path):
    rows = load(grouped(tmp_path), group=r"/(p\d+)_")
    rows.write_split(tmp_path / "split.csv")
    again = load(tmp_path / "photos", tmp_path / "split.csv")
    assert split_of(again) == split_of(rows)
    assert list(again.groups) == list(rows.groups)


@pytest.mark.parametrize("group", [None, r"/(p\d+)_"])
def test_folds_partition_the_pictures(tmp_path, group):
    root = grouped(tmp_path)
    folds = [load(root, folds=5, fold=fold, group=group) for fold in range(5)]
    tested = [path for rows in folds for path, split in split_of(rows).items() if split == "test"]
    assert sorted(tested) == list(folds[0].paths)
    for rows in folds:
        assert set(np.bincount(rows.splits) > 0) == {True}
        if group:
            assert all(len(splits) == 1 for splits in sides(rows).values())
        else:
            assert np.bincount(rows.splits) / len(rows.splits) == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


def test_val_is_carved_from_train_by_whole_groups(tmp_path):
    grouped(tmp_path).rename(tmp_path / "train")
    rows = load(tmp_path, group=r"/(p\d+)_")
    found = {}
    for path, split in split_of(rows).items():
        found.setdefault(path.split("/")[2].split("_")[0], set()).add(split)
    assert {frozenset(splits) for splits in found.values()} == {frozenset({"train"}), frozenset({"val"})}


def test_group_beside_a_split_file_is_kept_and_what_lies_on_both_sides_is_said(tmp_path):
    root = grouped(tmp_path)
    load(root).write_split(tmp_path / "split.csv")
    rows = load(root, tmp_path / "split.csv", group=r"/(p\d+)_")
    assert set(rows.groups) == {f"p{number:02d}" for number in range(12)}
    assert any("lie on both sides" in notice for notice in rows.notices)


def test_two_folds_leave_something_to_train_on(tmp_path):
    assert "a (3)" in refusal(make_pictures(tmp_path / "p", {"a": 3, "b": 9}), folds=2, fold=0)
    rows = load(make_pictures(tmp_path / "q", {"a": 4, "b": 9}), folds=2, fold=1)
    assert min(np.bincount(rows.labels[rows.rows("train")])) == 1


def test_one_picture_under_two_spellings_is_one(tmp_path):
    text = "path,label\n" + "\n".join(LINES) + "\n./pics//a/000.png,b\n"
    assert "pics/a/000.png more than once" in refusal(table(tmp_path, text))


def test_groups_on_both_sides_of_a_given_split_are_said(tmp_path):
    for split in ("train", "val"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(4):
                (tmp_path / split / label / f"p{number}.png").touch()
    assert any("4 groups lie on both sides" in notice for notice in load(tmp_path, group=r"p\d").notices)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"folds": 5}, "--data.fold is None"),
        ({"fold": 1}, "--data.folds is None"),
        ({"folds": 5, "fold": 5}, "a fold from 0"),
        ({"folds": 1, "fold": 0}, "two folds or more"),
        ({"folds": 99, "fold": 0}, "needs at least 99"),
        ({"group": "("}, "no regular expression"),
        ({"group": "nothing like it"}, "matches none of the paths; the first is a/p00_0.png"),
        ({"group": "png"}, "Too few groups"),
        ({"folds": 2, "fold": 0, "split": "split.csv"}, "exclude each other"),
        ({"fold": 3, "split": "split.csv"}, "--data.folds is None"),
        ({"group": r"\d*"}, "matches none of the paths"),
    ],
)
def test_split_that_cannot_be_made_says_why(tmp_path, options, said):
    root = grouped(tmp_path)
    load(root).write_split(tmp_path / "split.csv")
    if "split" in options:
        options = options | {"split": tmp_path / "split.csv"}
    assert said in refusal(root, **options)


def test_folds_of_a_folder_that_is_split_are_refused(tmp_path):
    make_pictures(tmp_path / "train", {"a": 9, "b": 9})
    assert "split already" in refusal(tmp_path, folds=3, fold=0)


def test_names_with_spaces_and_backslashes_come_back_from_the_split_file(tmp_path):
    root = make_pictures(tmp_path / "photos", {"a": 9, "b ": 9})
    (root / "a" / " odd\\name .png").touch()
    load(root).write_split(tmp_path / "split.csv")
    again = load(root, tmp_path / "split.csv")
    assert split_of(again) == split_of(load(root))
    assert again.class_names == ["a", "b "]


def test_paths_of_a_table_from_windows_are_found(tmp_path):
    rows = load(table(tmp_path, "\n".join(["path,label", *(line.replace("/", "\\") for line in LINES)])))
    assert (tmp_path / rows.paths[0]).exists()


def test_excluded_paths_are_left_out_and_counted(tmp_path):
    root = make_pictures(tmp_path / "photos", {"a": 20, "b": 20})
    (tmp_path / "out.csv").write_text(f"path,reason\na/003.png,bad\n{root}/a/004.png,bad\nz/1.png,gone\n")
    rows = load(root, exclude=tmp_path / "out.csv")
    assert len(rows.paths) == 38
    assert not {"a/003.png", "a/004.png"} & set(rows.paths)
    assert any("2 of 3 paths" in notice for notice in rows.notices)


# rows, compact and kept


def test_texts_are_a_sequence_of_strings():
    names = ["", "a", "ü/ß.png", "caf\udce9", "x" * 1000]
    texts = Texts.of(names)
    assert (list(texts), len(texts), texts[-1], texts[1:3]) == (names, 5, names[-1], names[1:3])
    assert [texts[place] for place in range(5)] == names
    assert pickle.loads(pickle.dumps(texts))[2] == names[2]
    with pytest.raises(IndexError):
        texts[5]


@pytest.fixture
def old(workplace):
    """photos/, whose folders changed long enough ago to be trusted."""
    root = make_pictures(workplace / "photos", {"a": 20, "b": 20})
    grow_old(root)
    return root


def grow_old(root):
    for folder in (root, *root.iterdir()):
        os.utime(folder, (1_700_000_000, 1_700_000_000 + hash(folder.stat().st_mtime_ns) % 1000))


def without_reading(monkeypatch, root, **options):
    with monkeypatch.context() as patched:
        patched.setattr(folders, "entries", None)
        return load(root, keep=True, **options)


def test_second_start_reads_no_folder_and_gives_the_same_rows(old, monkeypatch):
    first = load(old, keep=True, group=r"/(\d+)")
    again = without_reading(monkeypatch, old, group=r"/(\d+)")
    assert split_of(first) == split_of(again) == split_of(load(old, group=r"/(\d+)"))
    assert again.labels.tolist() == first.labels.tolist()
    assert (again.class_names, again.notices, list(again.groups)) == (
        first.class_names,
        first.notices,
        list(first.groups),
    )
    assert len(pickle.dumps(again.paths)) < 500  # a worker maps the file
    assert list(pickle.loads(pickle.dumps(again.paths))) == list(first.paths)


def change_name(root):
    (root / "a" / "000.png").rename(root / "a" / "new.png")


def change_folder(root):
    make_pictures(root, {"c": 5})


def change_below(root):
    (root / "b" / "019.png").unlink()


@pytest.mark.parametrize("change", [change_name, change_folder, change_below])
def test_changed_tree_is_noticed(old, change):
    load(old, keep=True)
    change(old)
    assert split_of(load(old, keep=True)) == split_of(load(old))


def test_tree_that_is_just_being_written_is_read_again(workplace, monkeypatch):
    root = make_pictures(workplace / "photos", {"a": 20, "b": 20})
    load(root, keep=True)
    with pytest.raises(TypeError):
        without_reading(monkeypatch, root)


def test_other_options_have_rows_of_their_own(old):
    load(old, keep=True)
    assert split_of(load(old, keep=True, seed=1)) == split_of(load(old, seed=1)) != split_of(load(old))
    assert split_of(load(old, keep=True, folds=2, fold=1)) == split_of(load(old, folds=2, fold=1))


def test_rows_that_are_made_anew_do_not_reach_the_workers_of_a_running_fit(old):
    first = load(old, keep=True)
    (old / "a" / "000a.png").touch()  # every later row moves on by one
    grow_old(old)
    second = load(old, keep=True)
    assert second.paths.source
    assert first.paths.source
    assert list(pickle.loads(pickle.dumps(first.paths))) == list(first.paths) != list(second.paths)
    packed = pickle.dumps(second.paths)
    (old / "a" / "000b.png").touch()
    grow_old(old)
    load(old, keep=True)
    with pytest.raises(RuntimeError, match="start again"):  # replaced between sending and opening
        pickle.loads(packed)


def test_damaged_rows_are_read_from_the_folder_again(old):
    load(old, keep=True)
    (kept,) = manifest.CACHE.glob("*.rows")
    for content in (b"", b"{}\n", kept.read_bytes()[:150], b"\xff" * 500):
        Path("damaged").write_bytes(content)
        Path("damaged").replace(kept)
        assert split_of(load(old, keep=True)) == split_of(load(old))


def test_rows_that_cannot_be_kept_are_used_all_the_same(old):
    manifest.CACHE.parent.mkdir()
    manifest.CACHE.write_text("a file where the folder should be")
    assert len(load(old, keep=True).paths) == 40
