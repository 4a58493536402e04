"""What a run directory holds, checked before it is believed: the shape of ``run.json``, and what was trained."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ftune.data.formats import Format
from ftune.errors import FtuneError, RunDirError
from ftune.methods import Context, Method
from ftune.regular import kind_of, open_regular
from ftune.run.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RESTORE", "digests_of", "explain", "put_on", "require_digests", "require_record"]

RESTORE = "restore it from a copy, or train anew with --overwrite"
_WEIGHTS = (".safetensors", ".bin", ".pt")
_NOT_READ = ("README.md",)  # people write their own before they share what they trained
_WHOLE_BYTES = 2**28
_SAMPLES, _SAMPLE_BYTES = 256, 2**16


class _Part(BaseModel):
    # not strict about what else is there: newer versions add to it
    model_config = ConfigDict(extra="allow", strict=True)


_Count = Annotated[int, Field(ge=1, lt=2**63)]


class _Training(_Part):
    steps: _Count
    global_batch: _Count
    world_size: _Count = 1
    gradient_accumulation_steps: _Count = 1


class _Data(_Part):
    fingerprint: str
    eval_fingerprint: str | None = None
    format: Format


class _Plan(_Part):
    training: _Training
    data: _Data


class _Pin(_Part):
    asked: str | None
    commit: str


class _Lean(_Part):
    loss: str = ""


class _Record(_Part):
    resolved: dict[str, Any]
    plan: _Plan
    status: str = "unknown"
    pinned: dict[str, _Pin] = {}
    lean: _Lean = _Lean()
    data_changed: list[dict[str, Any]] = []
    artifact_sha256: dict[str, str] = {}


def require_record(data: Any, path: Path) -> None:
    """Hold that ``run.json`` has what commands read from it, in the form in which training writes it.

    Raises:
        RunDirError: It has not; the message names each field.
    """
    if not isinstance(data, dict):
        raise RunDirError(f"{path} is damaged: it is no JSON object", help=RESTORE)
    try:
        _Record.model_validate(data)
    except ValidationError as error:
        raise RunDirError(f"{path} is damaged:\n  " + "\n  ".join(explain(error)), help=RESTORE) from error


def explain(error: ValidationError) -> list[str]:
    """What pydantic found wrong: a line for each of the first ten fields."""
    found = [
        f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}"
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    return found[:10] + ([f"and {len(found) - 10} more"] if len(found) > 10 else [])


def digests_of(directory: Path) -> dict[str, str]:
    """SHA-256 of each file below a directory that is read again; of a large one, of its size and a sample of it.

    Returns:
        By each file's path in the directory, with ``/`` between its parts: a tokenizer may have a directory of chat
        templates.

    Raises:
        IrregularError: Something is neither a file nor a directory.
        OSError: A file cannot be read.
    """
    return {name: _digest(path) for name, path in _files(directory).items() if name not in _NOT_READ}


def _files(directory: Path) -> dict[str, Path]:
    """What is below a directory and is none, by its path in it; no link is followed."""
    found: dict[str, Path] = {}
    for path in sorted(directory.iterdir()):
        if kind_of(path) == "a directory":
            found |= {f"{path.name}/{name}": file for name, file in _files(path).items()}
        else:
            found[path.name] = path
    return found


def require_digests(directory: Path, expected: dict[str, str]) -> None:
    """Hold that a directory holds what training wrote into it.

    Args:
        directory: The trained adapter or model.
        expected: What ``digests_of`` gave; empty for runs of older versions, which kept none.

    Raises:
        RunDirError: A file is missing, is another one, or holds weights and was not among them.
    """
    if not expected:
        return
    wrong = []
    try:
        there = _files(directory)
        for name, digest in expected.items():
            if name not in there:
                wrong.append(f"{name} is missing")
            elif _digest(there[name]) != digest:
                wrong.append(f"{name} is not the file that was written")
    except OSError as error:
        raise RunDirError(f"{directory} cannot be read: {error}") from error
    # at the top only, where loaders look by themselves
    extra = sorted(name for name in there.keys() - expected.keys() if name.endswith(_WEIGHTS) and "/" not in name)
    wrong += [f"{name} was not written by this run" for name in extra]
    if wrong:
        raise RunDirError(f"{directory} is not what was trained:\n  " + "\n  ".join(wrong[:10]), help=RESTORE)


def _digest(path: Path) -> str:
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for number in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def put_on(
    method: Method, base: nn.Module, directory: Path, context: Context, base_names: Collection[str]
) -> nn.Module:
    """Put what a run trained onto its base model, after it was held against the recipe.

    Args:
        method: Of the recipe.
        base: A freshly loaded base model.
        directory: The trained adapter or model.
        context: What the method may know.
        base_names: How the run calls its base.

    Raises:
        FtuneError: The files cannot be read, or are not those of this recipe.
    """
    from ftune.methods.agreement import require_agreement

    try:
        if method.saved_as == "peft":
            require_agreement(method, base, directory, context, base_names)
        model = method.load(base, directory, context)
        if method.saved_as != "peft":  # of PEFT's, the file was looked through
            _require_finite(model, directory)
        return model
    except FtuneError:
        raise
    except Exception as error:  # of a damaged file libraries raise whatever they stumble over
        if is_out_of_memory(error):
            raise
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunDirError(f"{directory} cannot be loaded: {said}", help=RESTORE) from error


def _require_finite(model: nn.Module, directory: Path) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(parameter.isfinite().all()):
            raise RunDirError(f"{directory} holds numbers that are not finite, in `{name}`", help=RESTORE)
