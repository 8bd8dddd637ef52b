"""Prints constraints for pip, from the standard library alone: python scripts/constraints.py tested|lowest|torch.

tested: constraints.txt, but with the torch that this Python already has, if pyproject.toml admits it.
lowest: the oldest versions that pyproject.toml admits of what users install, to test its floors. Of what its extra
dev alone names: the lines of constraints.txt, since with their floors, too, pip searches for longer than a CI job runs.
torch: the version that `tested` keeps; exit code 1 if there is none.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parent.parent


def needed() -> tuple[list[str], list[str]]:
    """The requirements in pyproject.toml: of users, in dependencies and extras, and those of the extra dev."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    dev = extras.pop("dev")
    return sum(extras.values(), project["dependencies"]), dev


def floors() -> dict[str, str]:
    """The oldest version that pyproject.toml admits of each distribution that users install."""
    found = [re.match(r"([\w.-]+)(?:\[.*?\])?.*?>=([\w.]+)", line) for line in needed()[0]]
    return {match[1]: match[2] for match in found if match}


def plain(line: str) -> str:
    """The name at the start of a requirement, as pip compares it; empty for a comment."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", line)[0]).lower()


def lowest() -> list[str]:
    """The floors of what users install; of what dev alone names, the lines of constraints.txt."""
    users, dev = ({plain(line) for line in lines} for lines in needed())
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [f"{name}=={text}" for name, text in floors().items()] + [x for x in lines if plain(x) in dev - users]


def numbers(text: str) -> list[int]:
    """The release, without what follows it: [2, 14, 1] of 2.14.1a0+cpu."""
    return [int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", text)[0])]


def kept() -> dict[str, str]:
    """The versions of torch and torchvision that are there and new enough; torchvision only with torch."""
    found = {}
    for name in ("torch", "torchvision"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            return found
        if numbers(found[name]) < numbers(floors()[name]):
            del found[name]
            return found
    return found


def tested() -> list[str]:
    """The lines of constraints.txt; torchvision is free, to fit the torch that is kept, where it is not there."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if not (there := kept()):
        return lines
    others = [line for line in lines if not re.match(r"torch(vision)?==", line)]
    return others + [f"{name}=={text}" for name, text in there.items()]


def main(what: str) -> int:
    """Prints the constraints that `what` names."""
    if what == "torch":
        print(kept().get("torch", ""))
        return 0 if kept() else 1
    if what not in ("tested", "lowest"):
        sys.exit(f"constraints: {what!r} is none of tested, lowest and torch.")
    print("\n".join(tested() if what == "tested" else lowest()))
    return 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
