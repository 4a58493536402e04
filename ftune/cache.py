"""Files that ftune can make again: where they are kept, how they get there, and when they go.

Below every layer, on the standard library alone. An entry is a file or a directory ``<root>/<kind>/<name>``;
its time of change is the time of its last use. No run depends on the cache: where the root cannot be written,
there is none.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from ftune.errors import FtuneError

__all__ = ["cache_dir", "publish", "touch"]

DEFAULT_GIB = 10.0
TEMPORARY = ".tmp"
# stands beside a directory of entries that this module made
MADE = ".made-by-ftune-"
# a temporary file of this age belongs to a process that was killed
ABANDONED_SECONDS = 24 * 3600.0


def cache_dir(kind: str) -> Path | None:
    """The directory for entries of one kind, made if need be; None where caching is off.

    The root is ``$FTUNE_CACHE``, else ``$XDG_CACHE_HOME/ftune``, else ``~/.cache/ftune``. Caching is off where
    the directory cannot be made or written, where everybody on the machine may write it (what is read from there would
    be theirs), and with ``FTUNE_CACHE_GIB=0``. Raises FtuneError if
    ``$FTUNE_CACHE_GIB`` is not a number of at least 0.
    """
    if _limit_bytes() == 0:
        return None
    try:
        directory = _root() / kind
        # entries hold the user's data, which a cache below a shared directory must not show to others
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not directory.is_dir():
            directory.mkdir(mode=0o700, exist_ok=True)
            (directory.parent / f"{MADE}{kind}").touch()
        elif "FTUNE_CACHE" not in os.environ:  # one of an older version, which left no mark
            (directory.parent / f"{MADE}{kind}").touch()
        if os.name != "nt" and any(part.stat().st_mode & stat.S_IWOTH for part in (directory.parent, directory)):
            _warn_of(directory.parent)
            return None
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    return directory if os.access(directory, os.W_OK | os.X_OK) else None


@functools.cache
def _warn_of(root: Path) -> None:
    print(
        f"warning: the cache {root} is not used: everybody may write there; `chmod o-w` it, or set FTUNE_CACHE",
        file=sys.stderr,
    )


def publish(path: Path, write: Callable[[Path], None]) -> bool:
    """Make an entry that other processes see whole or not at all; then delete the oldest entries over the limit.

    ``write`` gets a name in the same directory and makes a file or a directory of that name. An entry that is
    there already is replaced if it is a file and kept if it is a directory. Returns whether the entry is there
    now: an OSError in between, such as a full disk, leaves no trace and is no error. Whatever else ``write``
    raises is raised, and leaves no trace either. The total of all entries is held below ``$FTUNE_CACHE_GIB``
    (10); the new entry itself stays whatever its size.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        write(temporary)
        if temporary.is_dir() and path.is_dir():
            touch(path)
        else:
            os.replace(temporary, path)
    except OSError:
        return False
    finally:
        _delete(temporary)
    _prune(path.parent.parent, _limit_bytes(), keep=path)
    return True


def touch(path: Path) -> None:
    """Note that an entry was used: the least recently used ones are deleted first."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _root() -> Path:
    if os.environ.get("FTUNE_CACHE"):
        return Path(os.environ["FTUNE_CACHE"]).expanduser()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "ftune"
    return Path.home() / ".cache" / "ftune"


def _limit_bytes() -> int:
    text = os.environ.get("FTUNE_CACHE_GIB") or str(DEFAULT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise FtuneError(f"FTUNE_CACHE_GIB={text}: expected a number of GiB, 0 for no cache")
    return int(gib * 2**30)


def _prune(root: Path, limit: int, keep: Path) -> None:
    """Delete entries, the least recently used first, until the total is within ``limit`` bytes.

    Only of directories that this module made: ``$FTUNE_CACHE`` may name one in which the user keeps other things.
    """
    entries: list[tuple[float, int, Path]] = []
    kinds = [path.name.removeprefix(MADE) for path in root.glob(f"{MADE}*")]
    for path in (path for kind in kinds for path in root.glob(f"{kind}/*")):
        # another process may delete what is being looked at
        with contextlib.suppress(OSError):
            used = path.stat().st_mtime
            if path.name.endswith(TEMPORARY):
                if time.time() - used > ABANDONED_SECONDS:
                    _delete(path)
            else:
                entries.append((used, _bytes(path), path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            break
        if path != keep:
            _delete(path)
            total -= size


def _bytes(path: Path) -> int:
    """Bytes of a file, or of the files below a directory."""
    files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
