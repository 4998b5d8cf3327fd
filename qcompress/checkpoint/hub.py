"""`hf://org/name@revision` is a folder of the Hugging Face cache, fetched into it where it is not there. No torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qcompress.errors import CheckpointError, UsageError

SCHEME = "hf:"
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md")
"""What a checkpoint folder has beside weights, and travels with them; pickles and other formats stay where they are."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+(@[\w.\-/]+)?")


def is_hub(path: Path) -> bool:
    """Whether a path names a repository: `hf://org/name`, which a Path holds as `hf:/org/name`."""
    return path.parts[:1] == (SCHEME,)


def hub_name(path: Path) -> str:
    """The repository's own name, by which outputs go."""
    return _parse(path)[0].rpartition("/")[2]


def local_path(path: Path) -> Path:
    """The path itself; of a repository the folder in the cache that holds the revision.

    raises  UsageError without huggingface_hub; CheckpointError for what is neither in the cache nor to be had
    """
    if not is_hub(path):
        return path
    name, revision = _parse(path)
    where = f"hf://{name}" + (f"@{revision}" if revision else "")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise UsageError(
            where, "the package huggingface_hub is not installed", "pip install 'qcompress[text]'"
        ) from None
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=list(WANTED), cache_dir=_cache())
    except LocalEntryNotFoundError:
        hint = "check name and connection, or fetch it first: hf download " + name
        raise CheckpointError(where, "is not in the cache, and cannot be fetched", hint) from None
    except Exception as error:
        # The library has an error of its own for each thing that a server may answer.
        what = f"cannot be fetched: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(where, what, "check name, revision and access") from None
    return Path(found)


def _cache() -> str | None:
    """Where the environment puts the cache now: the library has looked when it was imported."""
    home = os.environ.get("HF_HOME")
    return os.environ.get("HF_HUB_CACHE") or (str(Path(home) / "hub") if home else None)


def _parse(path: Path) -> tuple[str, str | None]:
    """org/name, and the revision. Raises CheckpointError."""
    text = "/".join(path.parts[1:])
    if not REPOSITORY.fullmatch(text):
        raise CheckpointError(f"hf://{text}", "names no repository", "write hf://org/name, or hf://org/name@revision")
    name, _, revision = text.partition("@")
    return name, revision or None
