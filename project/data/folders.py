"""Walks folders for images: which are splits, which are classes, and what is skipped."""

import os
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from fnmatch import fnmatch, translate
from pathlib import Path
from typing import Literal

from project.data.images import UNREAD_EXTENSIONS, is_image
from project.data.splits import Row
from project.errors import UserError, some

Layout = Literal["splits", "classes"]
SPLIT_OF_FOLDER = dict.fromkeys(("train", "training"), "train")  # by normalized name
SPLIT_OF_FOLDER |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
SPLIT_OF_FOLDER |= dict.fromkeys(("test", "testing", "holdout", "eval"), "test")
# Folders of Synology, QNAP and NetApp; Windows; macOS and netatalk; ext4; synchronisers; Lightroom
_TOOLS = """@eaDir, @tmp, @sharebin, @__thumb, @Recycle, @Recently-Snapshot, @Transcode, #recycle, #snapshot, ~snapshot,
Network Recycle Bin*, $RECYCLE.BIN, RECYCLER, System Volume Information, found.[0-9][0-9][0-9], __MACOSX, lost+found,
Network Trash Folder, Temporary Items, TheFindByContentFolder, TheVolumeSettingsFolder, _gsdata_, _SYNCAPP, *.ffs_tmp,
@SynologyDrive, @sharesnap, @S2S, @quarantine, $WinREAgent, $SysReset, Config.Msi, MSOCache, *.lrdata"""
_TOOL_NAME = re.compile("|".join(translate(name) for name in re.split(r",\s", _TOOLS)), re.IGNORECASE)
HIDDEN, NOT_IMAGE, NOT_SPLIT = "hidden", "not an image", "not a folder of train, val or test with images"
TOOL, LOOSE = "made by a NAS, a file manager or a synchroniser", "not inside a class folder"
OURS, EMPTY, UNREAD = "made by fit or explain", "folder without images", "image of a format that is not read"
_RESULTS = {"runs": ("latest",), "explanations": ("contact-sheet.png", "filters.png")}  # folders by what is in them
BROKEN = "link that leads nowhere or may not be followed"


class Skipped(defaultdict[str, list[str]]):
    """The paths that a scan leaves out, by the reason; names that `keep` matches are read though hidden or a tool's."""

    def __init__(self, keep: str = "") -> None:
        super().__init__(list)
        self.keep, self.notices = keep, list[str]()  # sentences about how the rest is read
        self.first, self.again = dict[str, str](), list[str]()  # real folders by first path; what is read once more

    def kind(self, entry: os.DirEntry[str], path: str) -> Literal["folder", "image", ""]:
        """What an entry is; the path of anything else is noted."""
        name = entry.name
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link to itself, or through a folder without permission
            is_folder = False
        reason = HIDDEN if name.startswith(".") else TOOL if is_folder and _TOOL_NAME.match(name) else ""
        if is_folder and any(os.path.lexists(f"{entry.path}/{file}") for file in _RESULTS.get(name.split("-")[0], ())):
            reason = OURS
        if not reason or fnmatch(name.casefold(), self.keep.casefold()):
            if is_folder or is_image(name):
                return "folder" if is_folder else "image"
            reason = UNREAD if name.lower().endswith(UNREAD_EXTENSIONS) else NOT_IMAGE
            reason = BROKEN if entry.is_symlink() and not os.path.exists(entry) else reason  # noqa: PTH110
        self[reason].append(path)
        return ""


def normalized(name: str) -> str:
    """A name in lower case and without separators, by which it may be a split's."""
    return re.sub(r"[\W_]", "", name.casefold())


def scan(root: Path, skipped: Skipped, layout: Layout | None = None) -> Iterator[Row]:
    """Yields the images of root/train|val|test/<class>/, or else of root/<class>/; links are followed.

    UserError where the root cannot be read, or in two ways; where two folders are for one split, or none is for train.
    """
    if layout == "classes" or not (splits := _splits(root, skipped, layout)):
        yield from _classes(root, "", "", skipped)
        return
    for entry in entries(root):
        if entry.name in splits:
            yield from _classes(root, *splits[entry.name], skipped)
        elif skipped.kind(entry, entry.name):
            skipped[NOT_SPLIT].append(entry.name)


def _splits(root: Path, skipped: Skipped, layout: Layout | None) -> dict[str, tuple[str, str]]:
    """Where the classes of each split's folder are, and its split; nothing where the folders are classes.

    Folders named like splits are splits if they share a class, or if there are no others and one of them has a class.
    Those with an affix and classes of their own, or with an affix beside others, are classes.
    """
    quiet, above = Skipped(skipped.keep), (os.path.realpath(root),)  # what is passed over here is noted by the scan
    names = _folders(root, quiet)
    if _words(names):  # folders without images decide nothing
        names = [name for name in names if next(images(str(root / name), name, quiet, above), None)]
    words = _words(names)
    if layout == "splits" and not words:
        raise UserError(f"{root} has no folder train; the layout splits needs the folders train, val and test.")
    # archives are often unpacked to train/train/<class>
    prefixes = {name: f"{name}/{name}/" if _folders(root / name, quiet) == [name] else f"{name}/" for name in names}
    inside = {name: set(_folders(root / prefixes[name], quiet)) for name in names}
    nested, others = [inside[name] for name in words if inside[name]], [name for name in names if name not in words]
    if layout is None and not (len(nested) > 1 and set.intersection(*nested)):
        has_affix = any(normalized(name) not in SPLIT_OF_FOLDER for name in words)
        if not words or (has_affix and (others or len(nested) == len(words))):
            shared = set.intersection(*inside.values()) if len(names) > 1 else set()
            if len(shared) > 1:  # perhaps these are the classes or splits
                skipped.notices.append(
                    f"{root} is read as the classes {some(names)}, each of which has the folders "
                    f"{some(sorted(shared))}; if either are splits, move the images to train/<class> and so on"
                )
            return {}
        if others or not nested:
            classes = some(sorted(set().union(*nested)))
            inner = f"with the classes {classes}" if nested else "without class folders"
            without = f", leaving out {some(others)}" if others else ""
            raise UserError(
                f"{root} can be read in two ways: as the classes {some(names)}; or as splits, {', '.join(words)}, "
                f"{inner}{without}. Give --data.layout classes or splits (of check: --layout)."
            )
    splits: dict[str, str] = {}
    for name in sorted(words, key=lambda name: words[name] == "eval"):  # beside test, eval is val
        is_val = words[name] == "eval" and "test" in splits.values()
        split = "val" if is_val else SPLIT_OF_FOLDER[words[name]]
        if same := [other for other in splits if splits[other] == split]:
            raise UserError(f"{root} has both {same[0]} and {name}; keep one of them.")
        splits[name] = split
    if "train" not in splits.values():
        raise UserError(f"{root} has {', '.join(sorted(splits))} but no train with images; rename the training folder.")
    if any(name.casefold() != split for name, split in splits.items()):
        said = ", ".join(f"{name} is {split}" for name, split in sorted(splits.items()))
        skipped.notices.append(f"{root} is read as splits: {said}; as classes by --data.layout classes")
    return {name: (prefixes[name], split) for name, split in splits.items()}


def _words(names: list[str]) -> dict[str, str]:
    """The names that are those of splits, alone or with one affix that all of them share; and the word in each."""
    found: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for name in names:
        for word in SPLIT_OF_FOLDER:
            if word in (plain := normalized(name)):
                found[tuple(plain.split(word, 1))][name] = word
    several = [words for words in found.values() if len({SPLIT_OF_FOLDER[word] for word in words.values()}) > 1]
    return found["", ""] or max(several, key=len, default={})


def _folders(folder: Path, skipped: Skipped) -> list[str]:
    """Names of the folders in a folder that are not passed over; none where it cannot be read."""
    return [entry.name for entry in entries(folder, skipped) if skipped.kind(entry, entry.name) == "folder"]


def _classes(root: Path, prefix: str, split: str, skipped: Skipped) -> Iterator[Row]:
    above = (os.path.realpath(root), os.path.realpath(root / prefix))
    for entry in entries(root / prefix, skipped if prefix else None, prefix.rstrip("/")):
        path = prefix + entry.name
        kind = skipped.kind(entry, path)
        if kind == "image":
            skipped[LOOSE].append(path)
        elif kind and (found := list(images(entry.path, path, skipped, above))):
            yield from (Row(image, entry.name, split) for image in found)
        elif kind and not any(paths[-1:] == [path] for paths in skipped.values()):  # the folder itself is not left out
            skipped[EMPTY].append(path)


def images(folder: str, name: str, skipped: Skipped, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the path, beginning with `name`, of every image in a folder and below it; each real folder is read once.

    Where it cannot be read, it is skipped if there are folders `above` it, to which links may lead back; else that is a
    UserError.
    """
    folders, links, read = deque([(folder, name, above)]), deque[tuple[str, str, tuple[str, ...]]](), set[str]()
    while folders or links:  # links last: of a folder and a link to it, the link is left out
        folder, name, above = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(folder)
        is_above = any(os.path.join(inner, "").startswith(os.path.join(real, "")) for inner in above)  # noqa: PTH118
        if is_above or real in read:
            skipped["link to a folder " + ("above it" if is_above else "that is read already")].append(name)
            continue
        read.add(real)
        if (first := skipped.first.setdefault(real, name)) != name:
            skipped.again.append(f"{name} is {first}")
        for entry in entries(folder, skipped if above else None, name):
            path = f"{name}/{entry.name}"
            kind = skipped.kind(entry, path)
            if kind == "image":
                yield path
            elif kind:
                (links if entry.is_symlink() else folders).append((entry.path, path, (*above, real)))


def nothing_in(root: Path, skipped: Skipped, what: str = "images") -> UserError:
    """The error for a data set without images in class folders."""
    if loose := skipped[LOOSE]:
        return UserError(
            f"{len(loose):,} images lie directly in {(root / loose[0]).parent}, without class folders; move each into "
            "the folder of its class, <class>/*.jpg, or list them in a CSV file with the columns path and label."
        )
    kinds = "; ".join(f"{kind}: {some(paths, 3)}" for kind, paths in skipped.items() if paths)
    left_out = f" Left out, {kinds}." if kinds else ""
    return UserError(f"No {what} in {root}; expected {root}/<class>/*.jpg or {root}/train/<class>/*.jpg.{left_out}")


def entries(folder: str | Path, skipped: Skipped | None = None, name: str = "") -> list[os.DirEntry[str]]:
    """The entries of a folder, by name; where it cannot be read, none and a note in `skipped`, or else a UserError."""
    try:
        with os.scandir(folder) as scan:
            return sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        if skipped is None:
            raise UserError(f"Cannot read the folder {folder}: {error.strerror}; change its permissions.") from error
        skipped[f"cannot be read ({error.strerror})"].append(name)
        return []
