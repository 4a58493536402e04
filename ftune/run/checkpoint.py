"""Checkpoints: saved whole, verified on load, enough to resume bit for bit.

A checkpoint holds the trained parameters, the optimizer's state, what the method adds, and the step. Random
state and the position in the data are pure functions of the step (see ``ftune.run.loop``), so neither is stored.
No pickle is trusted: parameters are safetensors, the optimizer's state is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from ftune.errors import RunFailed
from ftune.methods import Method
from ftune.run.files import new_directory, remove_leftovers
from ftune.run.tensors import read_tensors

__all__ = ["Checkpoints", "Restored"]


@dataclass(frozen=True)
class Restored:
    """What a checkpoint says beside tensors: where the run was."""

    step: int
    path: Path
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, under ``directory``; the newest ``keep`` stay.

    Args:
        directory: Usually ``RUN/checkpoints``.
        keep: How many stay on disk; an older one goes only when a newer one is complete.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        remove_leftovers(directory)

    def steps(self) -> list[int]:
        """Steps at which a complete checkpoint exists, oldest first."""
        if not self.directory.is_dir():
            return []
        names = (path.name for path in self.directory.iterdir() if (path / "manifest.json").is_file())
        return sorted(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` updates is."""
        return self.directory / f"step-{step}"

    def save(self, step: int, model: nn.Module, method: Method, optimizer: Optimizer, progress: dict[str, Any]) -> Path:
        """Save after ``step`` updates, then delete what is older than the ``keep`` newest.

        Args:
            step: Updates made so far.
            model: The adapted model, unwrapped.
            method: Adds its own state.
            optimizer: The optimizer.
            progress: JSON-able facts that the run wants back.
        """
        with new_directory(self.path(step)) as out:
            save_file(_trained(model), out / "trained.safetensors")
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state(model).items()}
            save_file(state, out / "method.safetensors")
            torch.save(optimizer.state_dict(), out / "optimizer.pt")
            (out / "progress.json").write_text(json.dumps({"step": step, **progress}, indent=2) + "\n")
            sums = {path.name: _sha256(path) for path in sorted(out.iterdir())}
            (out / "manifest.json").write_text(json.dumps({"sha256": sums}, indent=2) + "\n")
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return self.path(step)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose checksums hold, and a line for each damaged one passed over."""
        damaged: list[str] = []
        for step in reversed(self.steps()):
            wrong = _damage(self.path(step))
            if wrong is None:
                return self.path(step), damaged
            damaged.append(f"checkpoint {self.path(step)} is damaged ({wrong}): passed over")
        return None, damaged

    def load(self, path: Path, model: nn.Module, method: Method, optimizer: Optimizer) -> Restored:
        """Put a checkpoint's state into a freshly built model and optimizer.

        Raises:
            RunFailed: The checkpoint was made by another model or method.
        """
        trained = load_file(path / "trained.safetensors")
        mine = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if trained.keys() != mine.keys() or any(trained[name].shape != mine[name].shape for name in mine):
            raise RunFailed(f"{path} was saved from another model or method")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(trained[name])
        method.load_state(model, load_file(path / "method.safetensors"))
        optimizer.load_state_dict(read_tensors(path / "optimizer.pt"))
        progress = json.loads((path / "progress.json").read_text())
        return Restored(step=progress.pop("step"), path=path, progress=progress)


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that require grad, by name; tied ones appear once."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sums = json.loads((path / "manifest.json").read_text())["sha256"]
        for name, expected in sums.items():
            if _sha256(path / name) != expected:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None
