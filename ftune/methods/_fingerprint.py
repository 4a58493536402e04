"""Hold that what a method draws from a seed, and does not store, is drawn again as it was.

An adapter that stores only a seed is another model wherever the seed gives other numbers: under an edited
configuration, or another version of the generator. Its fingerprint lies beside it and is compared at every load
and every resume. It has a file of its own: safetensors writes several metadata entries in no fixed order.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ftune.errors import ModelError, RunFailed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["as_state", "check", "of", "require_same_state", "write"]

_FILE = "fingerprint.json"


def of(*tensors: Tensor) -> str:
    """SHA-256 over the bytes of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write(out: Path, what: str, digest: str) -> None:
    """Write the SHA-256 of what was drawn beside a saved adapter."""
    (out / _FILE).write_text(json.dumps({"drawn": what, "sha256": digest}, indent=2) + "\n")


def check(directory: Path, what: str, digest: str, way_out: str) -> None:
    """Compare what was drawn now with what the saved adapter was trained with; without the file, trust it.

    Raises:
        ModelError: It is not the same.
    """
    file = directory / _FILE
    if file.is_file() and json.loads(file.read_text())["sha256"] != digest:
        raise ModelError(f"the {what} drawn here are not those this adapter was trained with", help=way_out)


def as_state(digest: str) -> dict[str, Tensor]:
    """The fingerprint as a checkpoint keeps it: (32,), uint8."""
    import torch

    return {"fingerprint": torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)}


def require_same_state(state: dict[str, Tensor], what: str, digest: str) -> None:
    """Compare what was drawn now with what the interrupted run drew.

    Raises:
        RunFailed: It is not the same.
    """
    if bytes(state["fingerprint"].tolist()).hex() != digest:
        raise RunFailed(
            f"the {what} differ from those this run started with",
            help="resume with the seed and the library versions that began the run",
        )
