"""Tokenized splits that are kept from one command to the next, by the content of all that decides them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ftune.cache import cache_dir, publish, touch
from ftune.data.chat import ChatTemplate, special_tokens
from ftune.data.examples import Examples
from ftune.data.sources import Rows
from ftune.installed import version_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Entry", "key_of", "load", "store"]

KIND = "tokens"
PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
# template functions whose answer changes with the day
DATED = "strftime_now"


@dataclass(frozen=True)
class Entry:
    """What is kept of a split.

    Attributes:
        examples: The examples.
        stats: The fields of its ``Stats``.
        fingerprint: Its fingerprint.
    """

    examples: Examples
    stats: Mapping[str, Any]
    fingerprint: str


def key_of(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, settings: Mapping[str, Any]
) -> str | None:
    """A name that differs wherever the tokens could; None for a tokenizer whose code cannot be told.

    The rows count by their source's content and by which of them are used, the tokenizer by its whole
    definition, this code by the text of its modules. ``settings`` are JSON-able.
    """
    kind = type(tokenizer)
    # a class that came with a model does as it likes
    if not kind.__module__.startswith("transformers."):
        return None
    parts: list[Any] = [
        rows.fingerprint,
        rows.columns,
        [Path(name).suffix.lower() for name in rows.origin],
        _digest(np.asarray(rows.numbers, dtype=np.int64).tobytes()),
        [kind.__module__, kind.__qualname__],
        _digest(tokenizer.backend_tokenizer.to_str().encode()),
        sorted(special_tokens(tokenizer).items()),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        bool(getattr(tokenizer, "split_special_tokens", False)),
        template and [template.source, date.today().isoformat() if DATED in template.source else None],
        settings,
        _code(),
        [version_of(name) for name in PACKAGES],
    ]
    return _digest(json.dumps(parts, sort_keys=True).encode())


def load(key: str | None) -> Entry | None:
    """The entry of that name; None where there is none, or one that is damaged."""
    path = _path(key)
    if path is None or not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if metadata["sha256"] != _checksum(arrays, metadata):
            return None
        count = int(arrays["lengths"].sum())
        examples = Examples(
            ids=arrays["ids"].astype(np.int32),
            trained=np.unpackbits(arrays["trained"], count=count).view(np.bool_),
            lengths=arrays["lengths"].astype(np.int64),
            rows=arrays["rows"].astype(np.int64),
        )
        entry = Entry(examples, json.loads(metadata["stats"]), metadata["fingerprint"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    touch(path)
    return entry


def store(key: str | None, entry: Entry) -> None:
    """Keep an entry: 2 bytes and a bit a token where the vocabulary has up to 65,536."""
    path = _path(key)
    if path is None:
        return
    from safetensors.numpy import save

    examples = entry.examples
    arrays = {
        "ids": _narrow(examples.ids),
        "trained": np.packbits(examples.trained),
        "lengths": _narrow(examples.lengths),
        "rows": _narrow(examples.rows),
    }
    metadata = {"stats": json.dumps(dict(entry.stats)), "fingerprint": entry.fingerprint}
    metadata["sha256"] = _checksum(arrays, metadata)
    content = save(arrays, metadata)
    publish(path, _writer(content))


def _writer(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def _path(key: str | None) -> Path | None:
    directory = cache_dir(KIND) if key is not None else None
    return directory / f"{key}.safetensors" if directory is not None else None


def _code() -> str:
    """Digest of the modules that decide tokens: whatever is changed in them makes other entries."""
    package = Path(__file__).parent
    modules = sorted([*package.glob("*.py"), *(package.parent / "recipe").glob("*.py")])
    return _digest(b"\0".join(module.read_bytes() for module in modules))


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same numbers, none negative, in the smallest unsigned type that holds them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(f"{metadata['stats']}\n{metadata['fingerprint']}\n".encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
