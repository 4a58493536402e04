"""GGUF files, converted once into transformers' own files and kept in the cache.

Reading a GGUF file takes seconds for its header alone (its vocabulary is parsed element by element, once for the
configuration, once for the tokenizer and once for the weights), then for dequantizing. What transformers made of
it is kept as a directory that loads like any other, bit for bit the same.

An entry is named by what decides its content: the file's path, size and time of change, and the versions of the
libraries that convert it. The weights have an entry for each dtype they are loaded in. An entry that is not whole
is made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.cache import cache_dir, publish, touch
from ftune.installed import version_of

if TYPE_CHECKING:
    import torch

__all__ = ["found_weights", "kept_config", "kept_tokenizer", "kept_weights"]

_FORMAT = 2  # raise it when what is kept is made in another way
_MANIFEST = "entry.json"


def kept_config(file: Path, read: Callable[[], Any]) -> Any:
    """The configuration of a GGUF file.

    Args:
        file: The GGUF file.
        read: Reads it with transformers, where it is not kept yet.
    """
    from transformers import AutoConfig

    def again(entry: Path) -> Any:
        config = AutoConfig.from_pretrained(entry, trust_remote_code=False)
        config.name_or_path = str(file.parent)
        return config

    def same(one: Any, other: Any) -> bool:
        return bool(one.to_dict() == other.to_dict())

    return _kept(file, "config", read, again, same)


def kept_tokenizer(file: Path, read: Callable[[], Any]) -> Any:
    """The tokenizer of a GGUF file.

    Args:
        file: The GGUF file.
        read: Reads it with transformers, where it is not kept yet.
    """
    from transformers import AutoTokenizer

    def again(entry: Path) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(entry, trust_remote_code=False)
        tokenizer.name_or_path = str(file.parent)
        return tokenizer

    def content(tokenizer: Any) -> tuple[Any, ...]:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return (
            type(tokenizer),
            backend.to_str() if backend else None,
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
            tokenizer.model_max_length,
            tokenizer.padding_side,
            tokenizer.truncation_side,
        )

    return _kept(file, "tokenizer", read, again, lambda one, other: content(one) == content(other))


def kept_weights(file: Path, dtype: torch.dtype, dequantized: Callable[[], Any]) -> Path | None:
    """A directory with the dequantized weights of a GGUF file in safetensors; None where there is no cache.

    Args:
        file: The GGUF file.
        dtype: What the weights are loaded in.
        dequantized: Makes the dense model in that dtype, where it is not kept yet.
    """
    entry = _entry(file, str(dtype).removeprefix("torch."))
    if entry is None:
        return None
    if not _whole(entry):
        shutil.rmtree(entry, ignore_errors=True)
        if not publish(entry, lambda temporary: _save_weights(dequantized(), temporary)):
            return None
    touch(entry)
    return entry


def found_weights(file: Path, dtype: torch.dtype) -> Path | None:
    """The directory that ``kept_weights`` made of a GGUF file before, or None."""
    entry = _entry(file, str(dtype).removeprefix("torch."))
    return entry if entry is not None and _whole(entry) else None


def _save_weights(model: Any, directory: Path) -> None:
    model.save_pretrained(directory, max_shard_size="4GB")
    _seal(directory)


def _kept(
    file: Path, part: str, read: Callable[[], Any], again: Callable[[Path], Any], same: Callable[[Any, Any], bool]
) -> Any:
    """Read a small part from its entry; else from the GGUF file, and keep it if it reads back the same."""
    entry = _entry(file, part)
    if entry is None:
        return read()
    if _whole(entry):
        try:
            found = again(entry)
        except (OSError, ValueError):
            pass
        else:
            touch(entry)
            return found
    made = read()

    def write(directory: Path) -> None:
        made.save_pretrained(directory)
        if not same(again(directory), made):
            raise OSError("transformers does not read back what it wrote")
        _seal(directory)

    shutil.rmtree(entry, ignore_errors=True)
    publish(entry, write)
    return made


def _entry(file: Path, part: str) -> Path | None:
    directory = cache_dir("gguf")
    return directory / f"{_key(file.resolve())}-{part}" if directory else None


def _key(file: Path) -> str:
    stat = file.stat()
    versions = [f"{name} {version_of(name)}" for name in ("transformers", "tokenizers", "gguf")]
    parts = (_FORMAT, file, stat.st_size, stat.st_mtime_ns, *versions)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _seal(directory: Path) -> None:
    """Note the size of every file, so that a truncated one is seen, and the content of all but the weights."""
    files = {path.name: _facts(path) for path in sorted(directory.iterdir())}
    (directory / _MANIFEST).write_text(json.dumps(files), encoding="utf-8")


def _whole(entry: Path) -> bool:
    try:
        files = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        return bool(files) and all(_facts(entry / name) == facts for name, facts in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def _facts(path: Path) -> list[Any]:
    small = path.suffix != ".safetensors"
    return [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest() if small else None]
