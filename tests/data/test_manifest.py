import hashlib
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from project.data import splits
from project.data.check import check_dataset
from project.data.inputs import gather
from project.data.manifest import SPLITS, load
from project.errors import UserError
from tests.conftest import make_images, read_csv

GROUP = r"p\d+"


def split_of(rows):
    return dict(zip(rows.paths, (SPLITS[s] for s in rows.splits), strict=True))


def refusal(root, **options):
    with pytest.raises(UserError) as caught:
        load(root, **options)
    return str(caught.value)


def grouped(root, groups=12, split=""):
    random = np.random.default_rng(0)
    for label in "abc":
        (root / split / label).mkdir(parents=True)
        for group in range(groups):
            for number in range(random.integers(1, 9)):
                (root / split / label / f"p{group:02d}_{number}.png").touch()
    return root


def sides(rows):
    found = {}
    for path, split in split_of(rows).items():
        found.setdefault(Path(path).name.split("_")[0], set()).add(split)
    return found


def test_each_class_is_split_70_10_20_in_the_order_of_sha256_of_seed_and_path_and_by_nothing_else(tmp_path):
    rows = load(make_images(tmp_path, {"a": 100, "b": 10, "c": 3}), seed=7)
    assert rows.class_names == ["a", "b", "c"]
    for label, (name, train, val, test) in enumerate((("a", 70, 10, 20), ("b", 7, 1, 2), ("c", 1, 1, 1))):
        paths = [path for path, row_label in zip(rows.paths, rows.labels, strict=True) if row_label == label]
        assert paths == [f"{name}/{number:03d}.png" for number in range(train + val + test)]
        paths.sort(key=lambda path: hashlib.sha256(f"7/{path}".encode()).digest())
        assert [split_of(rows)[path] for path in paths] == ["test"] * test + ["val"] * val + ["train"] * train


def test_split_folders_are_taken_as_they_are_a_missing_val_carved_from_train_and_a_missing_test_reported(tmp_path):
    for name, count in {"Train": 5, "validation": 2, "TEST": 3}.items():
        make_images(tmp_path / "all" / name, {"a": count, "b": count})
    rows = load(tmp_path / "all")
    assert np.bincount(rows.splits, minlength=3).tolist() == [10, 4, 6]
    assert split_of(rows)["validation/a/000.png"] == "val"
    make_images(tmp_path / "plain" / "train", {"a": 20, "b": 20})
    rows = load(tmp_path / "plain")
    assert np.bincount(rows.splits, minlength=3).tolist() == [36, 4, 0]
    assert "no val: 4 images of train are set aside" in rows.notices[0]
    assert "no test" in rows.notices[1]
    rows = load(grouped(tmp_path / "groups", split="train"), group=GROUP)  # by whole groups
    assert {frozenset(splits) for splits in sides(rows).values()} == {frozenset({"train"}), frozenset({"val"})}


def test_images_below_class_folders_belong_to_the_class_and_everything_else_is_reported(tmp_path):
    root = make_images(tmp_path / "data", {"bus": 5, "train": 5, ".ipynb_checkpoints": 5})  # a class called "train"
    make_images(root / "bus" / "monday", {"camera 1": 2})
    make_images(tmp_path / "elsewhere", {"more": 3})
    (root / "bus" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "bus" / "loop").symlink_to(root / "bus")  # followed once
    for name in ("bus/.hidden.png", "bus/notes.txt", "loose.png"):
        (root / name).touch()
    (root / "empty").mkdir()
    rows = load(root, layout="classes")
    assert "bus/monday/camera 1/000.png" in rows.paths
    assert (rows.class_names, np.bincount(rows.labels).tolist()) == (["bus", "train"], [10, 5])
    for name in (".ipynb_checkpoints", "bus/.hidden.png", "bus/notes.txt", "empty", "loose.png"):
        assert name in " | ".join(rows.notices)


def folder_of(tmp_path, *paths):
    """A folder with three images below each path."""
    for path in paths:
        make_images(tmp_path / "data" / Path(path).parent, {Path(path).name: 3})
    return tmp_path / "data"


TRAIN_TEST = {"train": "a b", "test": "a b"}


@pytest.mark.parametrize(
    ("folders", "expected", "said"),
    [
        ({"Training": "a b", "Testing": "a b"}, "a b", "Testing is test, Training is train"),
        ({"training_set": "a b", "test-set": "a b"}, "a b", "test-set is test, training_set is train"),
        ({"seg_train/seg_train": "a b", "seg_test/seg_test": "a b", "seg_pred": "x"}, "a b", "left out"),
        ({"train": "a b", "eval": "a b", "Hold-out": "a b"}, "a b", "Hold-out is test, eval is val"),
        ({"train": "a b", "eval": "a b", "TEST": "a b"}, "a b", "eval is val"),
        ({"train2017": "a b", "val2017": "a b"}, "a b", "val2017 is val"),
        (TRAIN_TEST | {"unlabelled": "x"}, "a b", "unlabelled"),
        ({"": "test_tube latest flask"}, "flask latest test_tube", ""),
        ({"my_train_data": "a b", "my_test_data": "a b"}, "a b", "my_test_data is test, my_train_data is train"),
        ({"road_train": "diesel steam", "road_test": "wet dry"}, "road_test road_train", ""),
        ({"01_train": "a b", "02_test": "a b"}, "01_train 02_test", "each of which has the folders a, b"),
        ({"cat": "train test", "dog": "train test"}, "cat dog", "each of which has the folders test, train"),
        ({"": "cat dog owl test"}, "as the classes cat, dog, owl, test; or as splits, test, without class", None),
        ({"": "bus car", "train": "diesel steam"}, "as splits, train, with the classes diesel, steam, leaving", None),
        ({"": "train test"}, "--data.layout classes or splits", None),
        ({"": "seg_train seg_test"}, "two ways", None),
    ],
)
def test_folders_are_splits_by_name_and_equal_classes_and_refused_where_both_are_possible(
    tmp_path, folders, expected, said
):
    root = folder_of(tmp_path, *(Path(folder, name) for folder, names in folders.items() for name in names.split()))
    if said is None:
        assert expected in refusal(root)
    else:
        rows = load(root)
        assert rows.class_names == expected.split()
        assert said in " | ".join(rows.notices)


def test_layout_decides_whether_folders_are_splits_or_classes(tmp_path):
    root = folder_of(tmp_path, "bus", "car", "train/diesel", "train/steam")
    rows = load(root, layout="classes")
    assert (rows.class_names, np.bincount(rows.labels).tolist()) == (["bus", "car", "train"], [3, 3, 6])
    rows.write_split(tmp_path / "split.csv")
    assert split_of(load(root, tmp_path / "split.csv")) == split_of(rows)  # which says what is what
    assert load(root, layout="splits").class_names == ["diesel", "steam"]
    assert "no folder train" in refusal(folder_of(tmp_path / "pets", "cat", "dog"), layout="splits")


def test_an_empty_folder_called_like_a_split_does_not_hide_those_with_images(tmp_path):
    root = folder_of(tmp_path, "seg_train/a", "seg_train/b", "seg_test/a", "seg_test/b")
    (root / "val").mkdir()
    assert load(root).class_names == ["a", "b"]


def test_class_names_that_look_alike_are_one_class_or_shown_as_different(tmp_path):
    names = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}
    root = folder_of(tmp_path, f"train/{names['NFD']}", "train/tea", f"val/{names['NFC']}", "val/tea")
    rows = load(root)
    assert (rows.class_names, np.bincount(rows.labels).tolist()) == ([names["NFD"], "tea"], [6, 6])
    lines = [
        f"{split}/{name}/000.png,{name},{split}" for split, name in (("train", names["NFD"]), ("val", names["NFC"]))
    ]
    lines += [f"{split}/tea/000.png,tea,{split}" for split in ("train", "val")]
    (root / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    assert load(root / "list.csv").class_names == [names["NFD"], "tea"]
    folder_of(tmp_path, f"train/{names['NFC']}")
    assert r"'cafe\u0301' is read as 'caf\xe9', which looks alike" in load(root).notices
    others = {
        "Tea": "'tea' and 'Tea'",
        "tea ": "'tea' and 'tea '",
        "t\u200bea": r"'t\u200bea'",
        "t\u0435a": r"'t\u0435a'",
    }
    for other, shown in others.items():
        (root / "val" / "tea").rename(root / "val" / other)
        assert f"{shown} look alike" in refusal(root)
        assert set(splits.counts(check_dataset(root).rows)) == {names["NFC"], "tea", other}
        (root / "val" / other).rename(root / "val" / "tea")


def test_links_lead_to_no_folder_above_and_a_folder_is_read_once_per_class(tmp_path):
    root = folder_of(tmp_path, "cat/young", "dog", "cat")
    folder_of(tmp_path / "elsewhere", "sub")
    links = {"cat/loop": "..", "all": ".", "cat/far": "/", "cat/a link": "young", "cat/self": "self"}
    links |= {"cat/more": "../../elsewhere/data", "cat/some": "../../elsewhere/data/sub", "kitten": "dog"}
    for link, target in links.items():
        (root / link).symlink_to(target)
    (tmp_path / "elsewhere" / "data" / "back").symlink_to(root)
    rows = load(root)
    assert (rows.class_names, np.bincount(rows.labels).tolist()) == (["cat", "dog", "kitten"], [9, 3, 3])
    assert "cat/young/000.png" in rows.paths
    notices = " | ".join(rows.notices)
    assert "link to a folder above it: all, cat/far, cat/loop and 1 more" in notices
    assert "read already: cat/a link, cat/some" in notices
    assert "nowhere or may not be followed: cat/self" in notices
    assert "through links, the same images are read twice: kitten is dog" in notices


def test_a_link_from_one_split_or_class_to_another_is_said(tmp_path):
    root = folder_of(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog")
    (root / "test" / "cat" / "again").symlink_to("../../train/cat")
    (root / "test" / "dog" / "cats").symlink_to("../cat")
    said = "read twice: test/dog/cats is test/cat, test/dog/cats/again is test/cat/again, train/cat is test/cat/again"
    assert any(said in notice for notice in load(root).notices)


def test_folders_of_a_nas_or_file_manager_are_passed_over_at_any_depth_unless_kept(tmp_path):
    names = ["@eaDir", "$Recycle.Bin", "#recycle", "System Volume Information", "__MACOSX", "lost+found", "_gsdata_"]
    root = folder_of(tmp_path, "cat", "dog", *names, *(f"cat/deep/{name}" for name in names))
    rows = load(root)
    assert (rows.class_names, len(rows.paths)) == (["cat", "dog"], 6)
    assert "synchroniser: #recycle, $Recycle.Bin, @eaDir and 11 more; --data.keep" in rows.notices[-1]
    assert load(root, keep="@EADIR").class_names == ["@eaDir", "cat", "dog"]


def test_results_of_this_project_are_passed_over(tmp_path):
    root = folder_of(tmp_path, "cat", "dog", "runs/pets", "explanations-2", "explanations-of-cats")
    (root / "runs" / "latest").symlink_to("pets")
    (root / "explanations-2" / "contact-sheet.png").touch()
    rows = load(root)
    assert rows.class_names == ["cat", "dog", "explanations-of-cats"]
    assert "left out, made by fit or explain: explanations-2, runs" in rows.notices
    assert not [finding for finding in check_dataset(root).findings if finding.kind == "skipped" and finding.problem]


def test_a_class_folder_with_nothing_but_images_of_a_format_that_is_not_read_is_refused(tmp_path):
    root = folder_of(tmp_path, "cat", "dog")
    for file in ("phone/deep/0.CR2", "phone/1.nef", "notes/about.txt"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    assert "No image in phone has a format that is read: phone/1.nef, phone/deep/0.CR2; convert" in refusal(root)
    assert check_dataset(root).findings[0].kind == "refused"
    folder_of(tmp_path, "phone")
    assert load(root).class_names == ["cat", "dog", "phone"]
    assert "left out, folder without images: notes" in load(root).notices


def test_what_may_not_be_entered_is_named_and_the_rest_is_used_but_not_the_root(workplace, capsys):
    root = folder_of(Path(), "cat/secret", "cat", "dog", "owl", "closed/in")
    (root / "dog" / "way").symlink_to("../closed/in")
    closed = [root / name for name in ("cat/secret", "owl", "closed")]
    user = os.geteuid()
    try:
        for folder in (workplace, *closed):
            folder.chmod(0o755 if folder == workplace else 0)
        os.seteuid(user or 65534)  # root may read everything
        rows, found = load(root), gather([str(root)])
        for read in (load, lambda closed: gather([str(closed)])):
            with pytest.raises(UserError, match="Permission denied"):
                read(root / "owl")
    finally:
        os.seteuid(user)
        for folder in closed:
            folder.chmod(0o755)
    assert found == [(f"data/{path}", "") for path in rows.paths]
    assert "left out, cannot be read (Permission denied): data/closed, data/owl, data/cat" in capsys.readouterr().err
    assert (rows.class_names, len(rows.paths)) == (["cat", "dog"], 6)
    notices = " | ".join(rows.notices)
    assert "cannot be read (Permission denied): cat/secret, closed, owl" in notices
    assert "may not be followed: dog/way" in notices


def test_split_file_gives_the_same_rows_again(tmp_path):
    root = make_images(tmp_path / "photos", {"a": 20, "ü,ß ": 20})
    (root / "a" / " odd\\name .png").touch()
    rows = load(root, seed=3)
    rows.write_split(tmp_path / "split.csv")
    assert {row["label"] for row in read_csv(tmp_path / "split.csv")} == {"a", "ü,ß "}
    make_images(root, {"a": 22})  # two more
    again = load(root, tmp_path / "split.csv")
    assert split_of(again) == split_of(rows)
    assert again.labels.tolist() == rows.labels.tolist()
    assert any("2 images" in notice and "left out" in notice for notice in again.notices)
    (root / "a" / "000.png").unlink()
    assert f"1 images of {tmp_path}/split.csv are not in {root}" in load(root, tmp_path / "split.csv").notices
    assert "split.csv is split already" in refusal(root, split=tmp_path / "split.csv", folds=3, fold=0)
    (tmp_path / "split.csv").write_text("path,label,split\na,b\n")
    assert "line 2, has no split" in refusal(root, split=tmp_path / "split.csv")


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({"": {"a": 9, "rare": 2}}, "Too few images for a split: rare (2); each class needs at least 3;"),
        ({"train": {"a": 4, "b": 4}, "val": {"a": 4, "c": 4}}, "only in train: b; only in val: c"),
        ({"": {"a": 4, os.fsdecode(b"caf\xe9"): 4}}, "not UTF-8"),
        ({name: {"a": 4, "b": 4} for name in ("train", "val", "valid")}, "both val and valid"),
        ({name: {"a": 4, "b": 4} for name in ("val", "test")}, "no train"),
        ({"../cats": {"": 3}, "../cats/.trash": {"a": 3}}, "No images"),
        ({"": {"": 3}}, "3 images lie directly in"),
        ({"": {"a": 3, "": 4}}, "at least two class folders. 4 images lie directly in"),
        (
            {"a": {"b": 3}},
            "one class, a; a classifier needs at least two class folders. If its folders are the classes or",
        ),
    ],
)
def test_unusable_folders_are_refused_with_the_reason(tmp_path, folders, expected):
    for name, classes in folders.items():
        make_images(tmp_path / name, classes)
    assert expected in refusal(tmp_path)


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
    assert (rows.root, rows.class_names) == (tmp_path, ["a", "b"])
    assert np.bincount(rows.splits).tolist() == expected
    assert list(rows.paths) == [line.split(",")[0] for line in LINES]


def test_parquet_table_is_read_like_a_csv_file_and_refused_like_one(tmp_path, monkeypatch):
    paths, labels, splits = zip(*(line.split(",") for line in GIVEN), strict=True)
    columns = {"Path": paths, "label": pyarrow.array(labels).dictionary_encode(), "split": splits}
    columns |= {"boxes": [[1, 2]] * 60, "score": [0.5] * 60}
    parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *GIVEN]))
    found, expected = load(tmp_path / "list.parquet"), load(tmp_path / "list.csv")
    assert ([*found.paths], found.class_names, found.root) == ([*expected.paths], expected.class_names, tmp_path)
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.splits.tolist() == expected.splits.tolist()
    parquet.write_table(pyarrow.table({"path": ["x", "y"], "label": [1, None]}), tmp_path / "holes.parquet")
    assert "holes.parquet, line 3, has no label; fill it in." in refusal(tmp_path / "holes.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and no more")
    assert "Cannot read" in refusal(tmp_path / "damaged.parquet")
    assert list(gather([str(tmp_path / "list.parquet")])) == list(gather([str(tmp_path / "list.csv")]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "list.parquet needs the library pyarrow; install it: pip install" in refusal(tmp_path / "list.parquet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("file,label\na,b", "no column path; it has file, label"),
        ("", "no column label, path; it has nothing"),
        ("path;label\na;b", "it has path;label. Its first line must name the columns, with commas between: path,label"),
        ("path,label\nx,\n", "line 2, has no label"),
        ("path,label\nx,a\n./y/..//x,b\n", "lists x more than once"),
        ("path,label,split\nx,a,train\ny,b,\n", "none for y"),
        ("path,label\n", "No images"),
        ("path,label,split\na,b,val\n", "No training images"),
        ("path,label\na,b\nc,b\nd,b\n", "one class, b"),
        (f"path,label\nx,{'a' * 200_000}\n", "list.csv: field larger than field limit (131072)."),
        ("path,label,split\na,b,tran\n", "has the split tran; it must be one of train, val, test."),
    ],
)
def test_unusable_csv_file_is_refused_with_the_reason(tmp_path, text, expected):
    (tmp_path / "list.csv").write_text(text)
    assert expected in refusal(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("encoding", "guess"), [("cp1252", "WINDOWS-1252"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16")]
)
@pytest.mark.parametrize("row", ["a.png,café", "café.png,tea"])
def test_a_table_that_is_not_utf8_is_called_one_by_fit_and_predict(tmp_path, encoding, guess, row):
    (tmp_path / "list.csv").write_text(f"path,label\n{row}\nb.png,tea\n", encoding=encoding)
    (tmp_path / "a.png").touch()
    said = f"list.csv is not UTF-8; save it as CSV UTF-8, or convert it: iconv -f {guess} -t"
    assert said in refusal(tmp_path / "list.csv")
    with pytest.raises(UserError, match=said):
        gather([str(tmp_path / "list.csv")])


def test_a_table_may_list_real_files_whose_names_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text(f"path,note\n{name},{name}\n", errors="surrogateescape")
    assert gather([str(tmp_path / "list.csv")]) == [(str(tmp_path / name), "")]
    root = make_images(tmp_path / "photos", {"a": 4, "b": 4})
    (root / "a" / name).touch()
    (tmp_path / "out.csv").write_text(f"path,reason\na/{name},bad\n", errors="surrogateescape")
    assert len(load(root, exclude=tmp_path / "out.csv").paths) == 8


def test_groups_stay_in_one_split_but_a_given_one_and_shares_are_nearly_kept(tmp_path):
    rows = load(grouped(tmp_path), group=GROUP)
    assert rows.notices == []
    assert all(len(splits) == 1 for splits in sides(rows).values())
    assert any(len(splits) > 1 for splits in sides(load(tmp_path)).values())  # without --data.group they do not
    assert np.bincount(rows.splits) / len(rows.splits) == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
    assert split_of(load(tmp_path, group=r"/(p\d+)_")) == split_of(rows)
    some = load(tmp_path, group="b/p0.")
    alone = sum(not path.startswith("b/p0") for path in some.paths)
    assert f"--data.group matches {len(some.paths) - alone} paths; the other {alone} images stand alone" in some.notices
    assert split_of(load(tmp_path, group=GROUP, seed=1)) != split_of(rows)
    rows.write_split(tmp_path / "split.csv")
    again = load(tmp_path, tmp_path / "split.csv")
    assert (split_of(again), again.groups) == (split_of(rows), rows.groups)
    load(tmp_path).write_split(tmp_path / "split.csv")
    kept = load(tmp_path, tmp_path / "split.csv", group=GROUP)  # though groups lie on both sides of this split
    assert set(kept.groups) == {f"p{number:02d}" for number in range(12)}
    assert any("lie on both sides" in notice for notice in kept.notices)
    few = sides(load(grouped(tmp_path / "few", 3), group=GROUP))
    assert sorted(next(iter(splits)) for splits in few.values()) == sorted(SPLITS)


def test_a_row_has_no_split_and_no_group_unless_they_are_given():
    assert splits.Row("a.png", "a") == ("a.png", "a", "", "")
    assert [splits.Row("a.png", "a", group=group).unit for group in ("", "g")] == ["a.png", "g"]


def rows_in_groups(sizes, labels="a"):
    """Rows of each class, in groups of these sizes."""
    names = [(label, size, number) for label in labels for size in sizes for number in range(size)]
    return [splits.Row(f"{label}/{size}/{number}", label, group=f"g{size}") for label, size, number in names]


@pytest.mark.parametrize("seed", [0, 1])
def test_groups_get_the_largest_first_the_shares_of_each_class(seed):
    of = {row.group: row.split for row in splits.assign(rows_in_groups([10, 70, 20]), seed)}
    assert of == {"g70": "train", "g20": "test", "g10": "val"}
    rows = rows_in_groups(range(1, 40), "ab")
    for fold in (None, 0, 1, 4):
        for counted in splits.counts(splits.assign(rows, seed, None if fold is None else 5, fold)).values():
            assert [counted[name] / 780 for name in SPLITS] == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    carved = splits.carve_val([row._replace(split="train") for row in rows], seed)
    assert [of["val"] for of in splits.counts(carved).values()] == pytest.approx([78, 78], abs=1)


def test_groups_that_leave_a_split_without_a_class_are_refused_by_the_name_of_the_class():
    """The groups of b lie in three splits, so do those of c; the one group of both leaves its split without an a."""
    classes = {"g0": "bc", "g1": "ab", "g2": "ac", "g3": "ac", "g4": "ab"}
    rows = [splits.Row(f"{label}/{group}", label, group=group) for group, of in classes.items() for label in of]
    with pytest.raises(
        UserError, match=r"cannot be split so that every split has every class; one lacks .*--data\.split"
    ):
        splits.assign(rows, 0)


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


def test_two_folds_leave_something_to_train_on(tmp_path):
    rows = load(make_images(tmp_path / "enough", {"a": 4, "b": 9}), folds=2, fold=1)
    assert min(np.bincount(rows.labels[rows.rows("train")])) == 1
    assert "a (3)" in refusal(make_images(tmp_path / "few", {"a": 3, "b": 9}), folds=2, fold=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"folds": 5}, "need each other"),
        ({"folds": 5, "fold": 5}, "no --data.fold 5 of --data.folds 5"),
        ({"folds": 1, "fold": 0}, "2 is the least"),
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
    listed = ["a/003.png", f"{root}/a/004.png", "a\\005.png", " ./a/006.png ", "z/1.png"]
    (tmp_path / "out.csv").write_text("\n".join(["path,reason", *(f"{path},bad" for path in listed)]))
    rows = load(root, exclude=tmp_path / "out.csv")
    assert len(rows.paths) == 36
    assert not {f"a/00{number}.png" for number in range(3, 7)} & set(rows.paths)
    assert any("4 of 5 paths" in notice for notice in rows.notices)
