"""A manifest: which files a directory consists of, and the checksum of each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from ftune.regular import read_regular

__all__ = ["MANIFEST", "damage", "write_manifest"]

MANIFEST = "manifest.json"


def write_manifest(directory: Path) -> None:
    """Write down every file that is in a directory, with its SHA-256."""
    sums = {path.name: _sha256(path) for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=2) + "\n")


def damage(directory: Path, files: Collection[str], *, from_disk: bool = False) -> str | None:
    """What is wrong with a directory by its manifest, or None.

    Args:
        directory: Where the manifest is.
        files: What must be there, and in the manifest; nothing else may be.
        from_disk: Whether to read what the disk has, not what the system still holds in memory.
    """
    try:
        sums = json.loads(read_regular(directory / MANIFEST, 1_000_000))["sha256"]
        if missing := sorted(set(files) - sums.keys()):
            return f"{MANIFEST} does not name {', '.join(missing)}"
        there = {path.name for path in directory.iterdir()} - {MANIFEST}
        if extra := sorted(there - sums.keys()):
            return f"{', '.join(extra)}: not in {MANIFEST}"
        for name, expected in sums.items():
            if name not in there:
                return f"{name} is missing"
            if _sha256(directory / name, from_disk=from_disk) != expected:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {error}" if not isinstance(error, OSError) else str(error)
    return None


def _sha256(path: Path, *, from_disk: bool = False) -> str:
    with path.open("rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # only a hint, which some file systems do not take
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()
