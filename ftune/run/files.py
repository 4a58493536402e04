"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftune.errors import FtuneError, RunFailed
from ftune.regular import kind_of, new_file, token

__all__ = [
    "as_os_error",
    "failed",
    "new_directory",
    "remove_leftovers",
    "require_writable",
    "sync",
    "told",
    "write_json",
    "write_text",
]

_ASIDE = ".tmp-"
_REPLACED = ".tmp-replaced-"
_ABANDONED_SECONDS = 24 * 3600.0
_YOUNG_SECONDS = 3.0
"""A file has no lock yet right after it is made; a command that is begun again takes longer until it sweeps."""


def sync(path: Path) -> None:
    """Force a file or a directory's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step: after a crash it is the old one or the new one, whole.

    A link at ``path`` is replaced, not followed, and so is none on the way: the new file has a name that nobody can
    foresee until it is whole. Who may read a file that is replaced, may read the new one, and nobody else.
    """
    aside = path.with_name(f"{_ASIDE}{path.name}-{token()}")
    try:
        with new_file(aside) as file:
            _hold(file.fileno())
            _take_rights(file.fileno(), path)
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    sync(path.parent)


def _take_rights(descriptor: int, path: Path) -> None:
    """Give an open file the owner and the rights of the file that it is going to replace."""
    if kind_of(path) is not None or not hasattr(os, "fchmod"):
        return
    with contextlib.suppress(OSError):  # there is none; or the owner is somebody else, and we are not root
        found = path.lstat()
        os.fchmod(descriptor, found.st_mode & 0o777)
        os.fchown(descriptor, found.st_uid, found.st_gid)


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Turn what safetensors and torch raise when a write fails into the ``OSError`` that it is."""
    try:
        yield
    except Exception as error:
        text = str(error)
        if isinstance(error, OSError):
            raise
        if number := re.search(r"os error (\d+)", text):  # safetensors, written in Rust
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        if isinstance(error, RuntimeError) and re.search(
            "PytorchStreamWriter|inline_container|file write failed|iostream", text
        ):
            raise OSError(errno.EIO, f"torch could not write: {text.splitlines()[0]}") from error
        raise


def failed(error: OSError, what: str, root: Path | None = None) -> RunFailed:
    """What to tell of an error of the operating system: its own reason, and what mends that one.

    Args:
        error: What was raised.
        what: What failed for it, as the beginning of a sentence: ``the merge``.
        root: The run directory, where there is one.
    """
    if root is not None and not root.is_dir():
        gone = f"{what} failed: {root} is not there any more"
        return RunFailed(gone, help="it was deleted, moved or unmounted meanwhile: put it back, or begin anew")
    reason = str(error) if error.strerror is None else f"{error.strerror}: {error.filename or 'no file is named'}"
    if error.filename is None and error.strerror is not None:
        reason = error.strerror
    help = {
        errno.ENOSPC: "free the disk",
        errno.EDQUOT: "free the disk, or ask for a larger quota",
        errno.EFBIG: "let a process write larger files: ulimit -f",
        errno.EROFS: "the file system takes no more writes: see what the system's log says of the disk",
        errno.EACCES: "give the right to read and write there",
        errno.EPERM: "give the right to read and write there",
        errno.EIO: "the disk may be failing, or its connection: see what the system's log says",
        errno.EMFILE: "let a process open more files: ulimit -n",
    }.get(error.errno or 0)
    return RunFailed(f"{what} failed: {reason}", help=help)


@contextlib.contextmanager
def told(what: str, root: Path | None = None) -> Iterator[None]:
    """Turn an error of the operating system in the block into one sentence (``failed``).

    Raises:
        RunFailed: In place of an ``OSError``; a reader that has gone away (``BrokenPipeError``) is no failure.
    """
    try:
        with as_os_error():
            yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise failed(error, what, root) from error


def require_writable(target: Path, marker: str, what: str) -> None:
    """Hold that ``new_directory`` can and may make ``target``, before the work that fills it.

    What a process that was killed left of the same target is deleted.

    Args:
        target: A directory to be made, or replaced where it holds an older one of its kind.
        marker: The file by which that kind is known.
        what: The kind, for the message.

    Raises:
        FtuneError: It cannot be written, or holds something else.
    """
    kind = kind_of(target)
    if kind == "a link":
        raise FtuneError(f"{target} is a link, and ftune writes through none", help="name the directory that is meant")
    ours = kind == "a directory" and kind_of(target / marker) is None and (target / marker).is_file()
    try:
        if os.path.lexists(target) and not ours and (kind != "a directory" or any(target.iterdir())):
            raise FtuneError(f"{target} exists and is no {what}", help="choose another --out")
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, of=target.name)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=_ASIDE):
            pass
    except OSError as error:
        raise FtuneError(f"cannot write to {target}: {error}", help="choose another --out") from error


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Give a directory to write into, which becomes ``target`` when the block ends well.

    It is new and its name cannot be foreseen, so nothing in it is a link that somebody put there. Everything in it
    reaches the disk before the rename. An older ``target`` is replaced; a link of that name too, not followed. When
    the block raises, nothing is left. What ``target`` is in must be there: a run that was deleted meanwhile is not made
    anew without its ``run.json``.
    """
    aside = target.with_name(f"{_ASIDE}{target.name}-{token()}")
    aside.mkdir()
    with contextlib.ExitStack() as held:
        held.callback(shutil.rmtree, aside, ignore_errors=True)
        held.enter_context(_held(aside))
        yield aside
        for path in sorted(aside.rglob("*")):
            sync(path)
        sync(aside)
        old = None
        if os.path.lexists(target):
            # A directory cannot be renamed over a full one: the old one steps aside first.
            old = target.with_name(f"{_REPLACED}{target.name}-{token()}")
            os.replace(target, old)
        try:
            os.replace(aside, target)
        except BaseException:
            if old is not None:
                os.replace(old, target)
            raise
        sync(target.parent)
        if old is not None:
            _delete(old)


def remove_leftovers(directory: Path, *, of: str | None = None) -> None:
    """Delete what a killed process left half written in ``directory``; put back what it was about to replace.

    What a living process is writing stays: it holds a lock on it, or has only just made it.

    Args:
        directory: Where to look; nothing happens where there is none.
        of: Only what was to become a file or directory of this name. None: everything of the form of ftune's
            temporary names, which is for a directory that is ftune's own.

    Raises:
        OSError: Something cannot be deleted.
    """
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        if not path.name.startswith(_ASIDE):
            continue
        named = re.fullmatch(rf"({re.escape(_REPLACED)}|{re.escape(_ASIDE)})(.+)-[0-9a-f]+", path.name)
        if of is not None and (named is None or named[2] != of):
            continue
        if named and named[1] == _REPLACED and not os.path.lexists(path.with_name(named[2])):
            os.replace(path, path.with_name(named[2]))
        elif kind_of(path) not in (None, "a directory") or not (_is_newer(path, _YOUNG_SECONDS) or _is_held(path)):
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a file, a link (not what it leads to) or a directory with all that is in it."""
    if kind_of(path) == "a directory":
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# --- who is still writing: a lock that goes with its process, however it ends ---


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Hold a lock on a temporary directory while it is filled, so that no other command sweeps it away."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a directory cannot be opened, on Windows
        yield
        return
    try:
        _hold(descriptor)
        yield
    finally:
        os.close(descriptor)


def _hold(descriptor: int) -> None:
    with contextlib.suppress(ImportError, OSError):  # a system or a file system without locks
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_held(path: Path) -> bool:
    """Whether a living process is writing it; where that cannot be asked, whether it was written within a day."""
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (ImportError, OSError):
        return _is_newer(path, _ABANDONED_SECONDS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES) or _is_newer(path, _ABANDONED_SECONDS)
    finally:
        os.close(descriptor)
    return False


def _is_newer(path: Path, seconds: float) -> bool:
    """Whether something was written in the last so many seconds; a file server's clock may be ahead."""
    try:
        return abs(time.time() - path.lstat().st_mtime) < seconds
    except OSError:
        return False
