"""What is named as a base model and is something else: what it is, and what to write instead.

Files are known by their names and first bytes; none is imported or unpickled.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ftune.methods import METHODS

__all__ = ["AGAIN", "SAFETENSORS_HELP", "Told", "damage", "other_directory", "other_file", "other_weights"]

Told = tuple[str, str]
"""What a path is, to be put behind its name; and what to do."""

SAFETENSORS_HELP = "take a revision that has safetensors, or convert it where you trust it, with save_pretrained"
AGAIN = "copy, download or convert it again"
_TRANSFORMERS = "take the same model in transformers' form: a directory with config.json and model.safetensors"
_DECODER = "take a causal language model: one whose config.json names a `...ForCausalLM`"
_COPY = "copy config.json and the tokenizer's files from where the weights come from"
MOST = 4  # names in a message

# Of a directory without config.json: the first that has such a file.
_KINDS: tuple[tuple[str, str, str], ...] = (
    ("model_index.json", "is a pipeline of diffusers (model_index.json)", _DECODER),
    ("modules.json", "is a model of sentence-transformers (modules.json)", _DECODER),
    ("params.json", "is an original checkpoint (params.json), not in transformers' form", _TRANSFORMERS),
    (
        "zero_to_fp32.py",
        "is a checkpoint of DeepSpeed in parts",
        "write its weights whole: zero_to_fp32.py does",
    ),
    ("*.distcp", "is a checkpoint of FSDP in parts", "write its weights whole: `accelerate merge-weights`"),
    ("*.safetensors", "holds weights and no config.json, which says what model they are of", _COPY),
    ("pytorch_model*.bin", "holds weights as a pickle, and no config.json", SAFETENSORS_HELP),
    ("tokenizer*.json", "holds a tokenizer and no model", "name the directory with config.json and the weights"),
)

_PICKLES = tuple((pattern, "a pickle") for pattern in ("pytorch_model*.bin", "model*.bin", "*.pth", "*.ckpt"))
_WEIGHTS = (
    *_PICKLES,
    ("*.h5", "a file of TensorFlow"),
    ("*.msgpack", "a file of Flax"),
    ("*.onnx", "an ONNX file"),
    ("onnx/*.onnx", "an ONNX file"),
    ("*.npz", "a file of NumPy"),
)
_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z"}
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf\Z", re.IGNORECASE)


def other_directory(path: Path) -> Told | None:
    """What a directory is that is no model, or not only one; None for a model of transformers."""
    if (path / "adapter_config.json").is_file():
        return _adapter(path)
    if (path / "config.json").is_file():
        return None
    if run := _run(path):
        return "is a run of ftune" if run == path else f"is a part of a run of ftune, `{run}`", _result(run)
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        return f"cannot be read ({error.strerror})", "correct its permissions"
    if not entries:
        return "is an empty directory", "download the model into it, or write its hub id, `org/name`"
    if lost := _lost_link(path, "*"):
        return lost
    if files := [entry for entry in entries if entry.suffix.lower() == ".gguf" and entry.is_file()]:
        return _ggufs(path, files)
    kind = next(((what, help) for pattern, what, help in _KINDS if any(path.glob(pattern))), None)
    if (path.parent / "config.json").is_file():
        return kind[0] if kind else "has no config.json", f"write `model: {path.parent}`, which has config.json"
    if below := None if kind else _below(path):
        return below
    return kind or ("has no config.json", "name a directory that has one, with weights and tokenizer, or a hub id")


def other_file(path: Path) -> Told:
    """What a file is that is named as a model and does not end in .gguf."""
    suffix = path.suffix.lower()
    if _head(path)[:4] == b"GGUF":
        return (
            "is a GGUF file whose name does not end in .gguf",
            f"rename it, or `ln -s {path} model.gguf`",
        )
    if suffix in _ARCHIVES:
        return "is an archive", "unpack it, and name the directory that holds config.json"
    if (path.parent / "adapter_config.json").is_file():
        _, help = _adapter(path.parent)
        return "is a file of an adapter", help
    if (path.parent / "config.json").is_file():
        return "is a file, and a model is a directory", f"write `model: {path.parent}`"
    if suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return "is a pickle, which ftune does not read", SAFETENSORS_HELP
    if suffix == ".safetensors":
        return "holds weights alone", f"{_COPY} into one directory with it, and name that"
    return "is a file, and not a GGUF file", "name the directory that holds config.json"


def other_weights(path: Path, *, pickles: bool = False) -> Told | None:
    """What the weights of a model of transformers are, where none are in safetensors and there are others.

    Args:
        path: Its directory.
        pickles: Look for these alone. What else is there does not matter to who only reads config.json.
    """
    if any(file.exists() for file in path.glob("*.safetensors*")):
        return None
    if not pickles and (lost := _lost_link(path, "*.safetensors*")):
        return lost
    if not pickles and (ggufs := sorted(path.glob("*.gguf"))):
        return _ggufs(path, ggufs)
    for pattern, what in _PICKLES if pickles else _WEIGHTS:
        if found := sorted(path.glob(pattern)):
            name = found[0].relative_to(path).as_posix()
            return f"has its weights in {what}, `{name}`, which ftune does not read", SAFETENSORS_HELP
    return None


def damage(file: Path) -> Told | None:
    """What a file of a model holds instead, by its first bytes; None where they tell nothing.

    Args:
        file: One that could not be read: JSON, a template, safetensors or GGUF.
    """
    head = _head(file)
    if not head:
        return ("is empty", AGAIN) if file.is_file() else None
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the file itself", "`git lfs pull` fetches it"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not the file itself: a download that failed", AGAIN
    if not head.strip(b"\0"):
        return "holds zeros: a copy or download that did not end", AGAIN
    if file.suffix in (".json", ".jinja"):
        return _text_damage(file)
    if head.isascii() and head[:4] != b"GGUF" and head.decode().isprintable():
        return f"is a text (`{head[:60].decode()}`), not the file itself: a download that failed", AGAIN
    if head[:4] == b"PK\3\4":
        return "is a pickle of torch, or a zip archive, under another name", SAFETENSORS_HELP
    if file.suffix == ".safetensors":
        return _cut_short(file, head)
    if file.suffix.lower() == ".gguf" and head[:4] != b"GGUF":
        return "is no GGUF file", AGAIN
    if (
        file.suffix.lower() == ".gguf"
        and len(head) > 8
        and (version := int.from_bytes(head[4:8], "little")) not in (2, 3)
    ):
        return (
            f"is a GGUF file of version {version}, and 2 and 3 can be read",
            f"{AGAIN}, or take another file of the model",
        )
    return None


def _text_damage(file: Path) -> Told | None:
    try:
        text = file.read_text(encoding="utf-8")
        found = {} if file.suffix == ".jinja" else json.loads(text)
    except OSError as error:
        return f"cannot be read ({error.strerror})", "correct its permissions"
    except RecursionError:
        return "is nested too deep", AGAIN
    except UnicodeDecodeError:
        return "is not UTF-8", AGAIN
    except json.JSONDecodeError as error:
        return f"is damaged at line {error.lineno}, column {error.colno}: {error.msg}", f"correct it, or {AGAIN}"
    return None if isinstance(found, dict) else ("holds no JSON object (`{...}`)", AGAIN)


def _cut_short(file: Path, head: bytes) -> Told | None:
    """Of a safetensors file with fewer bytes than its header speaks of."""
    size, length = file.stat().st_size, 8 + int.from_bytes(head[:8], "little")
    if length > 100_000_000:  # the most that safetensors takes
        return "is no safetensors file", AGAIN
    try:
        with file.open("rb") as opened:
            opened.seek(8)
            tensors = json.loads(opened.read(length - 8))
        end = length + max(about["data_offsets"][1] for name, about in tensors.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        end = length
    return (f"is cut short: {size:,} bytes of at least {end:,}", AGAIN) if size < end else None


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(256)
    except OSError:
        return b""


def _adapter(path: Path) -> Told:
    """Of a directory with an adapter, alone or beside a model."""
    if (path / "config.json").is_file():
        return (
            "holds an adapter (adapter_config.json) beside a model, which would be put onto it",
            "move adapter_config.json and its weights into another directory, or merge them first",
        )
    base = _field(path / "adapter_config.json", "base_model_name_or_path")
    what = f"is an adapter of `{base}`, not a model" if base else "is an adapter, not a model (adapter_config.json)"
    if run := _run(path):
        return what, _result(run)
    named = f"write `model: {base}`" if base else "name the model it belongs to"
    return what, f"{named}, or first merge the adapter into it, with PEFT: merge_and_unload() and save_pretrained()"


def _field(file: Path, *names: str) -> str | None:
    """A string in a JSON file, by the names that lead to it; None where there is none."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        for name in names:
            found = found[name]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) and found else None


def _run(path: Path) -> Path | None:
    """The run of ftune that a directory is, or is a part of: ``RUN/adapter``, ``RUN/checkpoints/step-N``."""
    return next((run for run in (path, *path.parents[:2]) if (run / "run.json").is_file()), None)


def _result(run: Path) -> str:
    for model in (run / "merged", run / "model"):
        if (model / "config.json").is_file():
            return f"write `model: {model}`"
    if (run / "adapter").is_dir():
        name = _field(run / "run.json", "resolved", "method", "name")
        if name in METHODS and not METHODS[name].mergeable:
            base = _field(run / "run.json", "resolved", "model", "id")
            return f"what `{name}` trains cannot be merged into a model: write its base, `model: {base}`"
        return f"merge it first: `ftune merge {run}`, then write `model: {run / 'merged'}`"
    return "it has no result yet: end it with `ftune train RECIPE --resume`"


def _lost_link(path: Path, pattern: str) -> Told | None:
    """Of a directory that was copied out of the hub's cache without what its links lead to."""
    lost = next((file.name for file in sorted(path.glob(pattern)) if file.is_symlink() and not file.exists()), None)
    if lost is None:
        return None
    return (
        f"holds links to files that are not there (`{lost}`)",
        "copy the files themselves: `cp -rL`, or the whole `models--org--name` of the hub's cache",
    )


def _ggufs(path: Path, files: list[Path]) -> Told:
    """Of a directory with GGUF files; the largest has lost least."""
    names = ", ".join(f"`{file.name}`" for file in files[:MOST]) + (", ..." if len(files) > MOST else "")
    if any(_PART.search(file.name) for file in files):
        return f"holds a GGUF file in parts: {names}", "make one file of them first: `llama-gguf-split --merge`"
    best = max(files, key=lambda file: file.stat().st_size)
    help = f"write `model: {{id: {path}, gguf_file: {best.name}}}`"
    if len(files) > 1:
        return f"holds {len(files)} GGUF files: {names}", f"{help}: the largest is the least rounded"
    return f"holds a GGUF file, {names}", help


def _below(path: Path) -> Told | None:
    """Of a directory above models: the hub's cache, the output of a trainer, or where models are kept."""
    if snapshots := [*path.glob("snapshots/*/config.json"), *path.glob("models--*/snapshots/*/config.json")]:
        repository = snapshots[0].parents[2]
        name = repository.name.removeprefix("models--").replace("--", "/")
        newest = max(repository.glob("snapshots/*/config.json"), key=lambda config: config.stat().st_mtime).parent
        return "is a directory of the hub's cache, above the model", f"write `model: {newest}`, or the hub id `{name}`"
    found = [str(config.parent) for config in sorted(path.glob("*/config.json"))]
    if not found:
        return None
    names = ", ".join(f"`model: {model}`" for model in found[:MOST]) + (", ..." if len(found) > MOST else "")
    return "is a directory above the model", f"write {'one of ' if len(found) > 1 else ''}{names}"
