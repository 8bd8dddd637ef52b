"""Bundles on the Hugging Face hub, whose address, token and cache are those of the library huggingface_hub."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from project.errors import UserError
from project.inference import bundle

PREFIX = "hf:/"  # of the two slashes, a Path keeps one
PARTS = [bundle.SUMS, bundle.CONFIG, bundle.MODEL, bundle.WEIGHTS]  # no code; the card may be edited on the hub
NO_ACCESS = "there is no such repository, or no permission; check the name, or log in by `hf auth login` or HF_TOKEN"
REASONS: dict[str | int, str] = {  # by HTTP status, or by the name of an error's class: versions differ in its module
    "HFValidationError": "the name of a repository is user/name, of letters, digits, dots, - and _",
    "RevisionNotFoundError": "the repository has no such branch, tag or commit; without @ it is the newest",
    "RemoteEntryNotFoundError": f"the repository has no {bundle.SUMS}; give one that `export --push` has made",
    **dict.fromkeys(("TransportError", "ConnectionError"), "the hub cannot be reached; check the network"),
    **dict.fromkeys(("RepositoryNotFoundError", 401), NO_ACCESS),
}


@contextmanager
def _api(refusal: str) -> Iterator[Any]:
    """Yields the API of the hub; an error in the block becomes a UserError that begins with `refusal`."""
    try:
        import huggingface_hub

        yield huggingface_hub.HfApi()
    except ImportError as error:
        raise UserError(f"{refusal} without the library {error.name}; install it: pip install -e .[hub]") from error
    except Exception as error:  # those of the library, and of the ones that it sends files by, share no base class
        keys = [kind.__name__ for each in (error, error.__cause__) for kind in type(each).__mro__]
        keys.append(getattr(getattr(error, "response", None), "status_code", ""))
        text = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{refusal}: {next((REASONS[key] for key in keys if key in REASONS), text)}.") from error


def download(address: str) -> Path:
    """The bundle hf://user/name or hf://user/name@REVISION, in the library's cache; UserError where there is none."""
    name, _, revision = address.removeprefix(PREFIX).strip("/").partition("@")
    with _api(f"{address} cannot be loaded") as api:
        sums = Path(api.hf_hub_download(name, bundle.SUMS, revision=revision or None))
        api.snapshot_download(name, revision=sums.parent.name, allow_patterns=PARTS)  # of the same commit
        return sums.parent


def push(folder: Path, name: str) -> str:
    """Uploads a bundle as a commit to a repository, which is created where there is none; returns its address."""
    again = shlex.join(["hf", "upload", name, str(folder)])
    with _api(f"{folder} is complete, but not on the hub (`{again}` tries again)") as api:
        url = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload a bundle")
        return f"hf://{url.repo_id}"
