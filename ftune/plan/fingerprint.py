"""What a base model on this disk is, in a few bytes: so that a run meets the weights that it began with.

The directory's name is no part of it, so that a model may be moved. A model of the hub has a commit instead
(``ftune.plan.pinned``).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from ftune.plan.base_model import gguf_path, read_template
from ftune.plan.weights import safetensors_files
from ftune.recipe.locate import locate_model
from ftune.recipe.schema import ModelSpec

__all__ = ["Text", "fingerprint", "text_fingerprint"]

SAMPLE = 256
"""Bytes read in one place. Whole files would take minutes."""
STRIDE = 2**22
"""Bytes of a tensor between two samples; a smaller tensor has one, in its middle."""
MAX_SAMPLES = 4096
"""Of all files: a fifth of a second on a disk that is not cached."""
MAX_HEADER = 100_000_000  # safetensors' own limit
_WITHOUT_MEANING = ("_name_or_path", "transformers_version")  # written anew by whoever saves a model
_TOKENIZERS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "special_tokens_map.json",
)
_OF_ITS_USE = (
    "padding",
    "truncation",
    "name_or_path",
    "special_tokens_map_file",
    "is_local",
    "local_files_only",
    *_WITHOUT_MEANING,
)
_TEMPLATES = ("chat_template.*", "additional_chat_templates/*")


def fingerprint(spec: ModelSpec) -> str | None:
    """A digest of a base model's configuration, code, headers, sizes and a sample of its weights.

    Every tensor is sampled, and large ones in more places: weights of another training differ in all of them. One
    changed number may go unseen. Of more than ``MAX_SAMPLES`` tensors so many are drawn, by their names.

    Args:
        spec: The recipe's model block.

    Returns:
        Hexadecimal digits; None for a model of the hub.

    Raises:
        ModelError: The model is not there.
        OSError: A file cannot be read.
    """
    located = locate_model(spec)
    if located.kind == "hub":
        return None
    digest = hashlib.sha256()
    if located.kind == "gguf":
        file = gguf_path(located)
        size = file.stat().st_size
        digest.update(str(size).encode())
        _sample(digest, file, [(0, size)], stride=max(STRIDE, size // MAX_SAMPLES))
        return digest.hexdigest()
    directory = Path(located.path_or_id)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if key not in _WITHOUT_MEANING}
    digest.update(json.dumps(config, sort_keys=True).encode())
    for code in sorted(directory.glob("*.py")):
        digest.update(code.name.encode() + hashlib.sha256(code.read_bytes()).digest())
    files = safetensors_files(str(directory), None)
    headers = [_header(file) for file in files]
    stride, drawn = _how_much([place for _, places in headers for place in places])
    for file, (header, places) in zip(files, headers, strict=True):
        digest.update(header)
        _sample(digest, file, [(place.offset, place.size) for place in places if place.name in drawn], stride=stride)
    return digest.hexdigest()


class Text(NamedTuple):
    """Digests of how a model's text becomes tokens: hexadecimal digits, or None where nothing on this disk says it."""

    tokenizer: str | None
    chat_template: str | None


def text_fingerprint(spec: ModelSpec, chat_template: str | None) -> Text:
    """Digests of a base's tokenizer and of the chat template, as their files have them.

    Not of the loaded tokenizer, which another version of its library may write otherwise.

    Args:
        spec: The recipe's model block. What a hub has is known by its commit, what a GGUF file has by its own digest.
        chat_template: The recipe's ``data.chat_template``, used in place of the base's own.

    Raises:
        DataError: That file cannot be read.
        ModelError: The model is not there.
        OSError: A file cannot be read.
    """
    own = _digest(read_template(Path(chat_template).expanduser())) if chat_template is not None else None
    located = locate_model(spec)
    if located.kind != "directory":
        return Text(None, own)
    directory = Path(located.path_or_id)
    read = {file.relative_to(directory).as_posix(): _plain(file) for file in _named(directory, *_TOKENIZERS)}
    config = read.get("tokenizer_config.json")
    inside = config.pop("chat_template", None) if isinstance(config, dict) else None
    templates = [file.read_text(encoding="utf-8", errors="replace") for file in _named(directory, *_TEMPLATES)]
    return Text(_digest(read), own or _digest([inside, *templates]))


def _named(directory: Path, *patterns: str) -> list[Path]:
    """A directory's files of such names, in a fixed order."""
    return sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})


def _plain(file: Path) -> Any:
    """A JSON file's content without what saving it anew changes; of another file its digest."""
    content = file.read_bytes()
    try:
        found = json.loads(content)
    except ValueError:
        return hashlib.sha256(content).hexdigest()
    if isinstance(found, dict):
        return {key: value for key, value in found.items() if key not in _OF_ITS_USE}
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Place(NamedTuple):
    """Where a tensor lies in its file: in bytes from the beginning."""

    offset: int
    size: int
    name: str


def _how_much(places: list[_Place]) -> tuple[int, set[str]]:
    """The bytes of a tensor between two samples, and the tensors that are sampled, for ``MAX_SAMPLES`` in all."""
    names = sorted({place.name for place in places})
    if len(names) > MAX_SAMPLES:
        # Not every so many: layers repeat, and a period that falls in step with them would see one kind of tensor.
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        return max((place.size for place in places), default=0) + 1, set(names[:MAX_SAMPLES])
    stride = STRIDE
    while len(places) + sum(place.size // stride for place in places) > MAX_SAMPLES and any(
        place.size > stride for place in places
    ):
        stride *= 2
    return stride, set(names)


def _header(file: Path) -> tuple[bytes, list[_Place]]:
    """What a safetensors file says of its tensors, in a fixed order, and where each lies."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        content = opened.read(min(length, MAX_HEADER))
    tensors: dict[str, Any] = json.loads(content)
    tensors.pop("__metadata__", None)
    places = []
    for name, about in tensors.items():
        begin, end = about["data_offsets"]
        places.append(_Place(8 + length + int(begin), int(end) - int(begin), name))
    return json.dumps(tensors, sort_keys=True).encode(), sorted(places)


def _sample(digest: Any, file: Path, places: list[tuple[int, int]], *, stride: int) -> None:
    """Add bytes of a file from the middle of every ``stride`` bytes of each place."""
    with file.open("rb", buffering=0) as opened:
        for offset, size in places:
            parts = 1 + (size - 1) // stride if size else 0
            for part in range(parts):
                middle = offset + (2 * part + 1) * size // (2 * parts) - SAMPLE // 2
                begin = max(offset, middle)
                opened.seek(begin)
                digest.update(opened.read(min(SAMPLE, offset + size - begin)))
