"""Checkpoints: saved whole, verified when written and when read, enough to resume bit for bit.

A checkpoint holds the trained parameters, the optimizer's state, what the method adds, and the step. Random
state and the position in the data are pure functions of the step (see ``ftune.run.steps``), so neither is stored.
No pickle is trusted: parameters are safetensors, the optimizer's state is read with ``weights_only=True``.

A damaged one is never deleted and never counted: it is renamed to ``step-N.damaged``, and the one before is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from ftune.errors import FtuneError, RunFailed
from ftune.methods import Method
from ftune.regular import read_regular, token
from ftune.run.engines import Gathered
from ftune.run.files import as_os_error, new_directory, sync
from ftune.run.manifest import damage, write_manifest
from ftune.run.tensors import read_tensors

__all__ = ["Checkpoints", "Restored"]

FILES = ("trained.safetensors", "method.safetensors", "optimizer.pt", "progress.json")
"""What a checkpoint consists of, beside its manifest."""
MAX_PROGRESS_BYTES = 100_000_000
"""The names of parameters that have not moved yet are in it."""
PROGRESS: dict[str, type] = {"step": int, "halvings": int, "by_length": bool, "base_loss": float}
"""Types of what a run wants back, where it is there."""
_NAME = re.compile(r"step-(0|[1-9]\d{0,17})")
_DAMAGED = re.compile(r"step-\d+\.damaged(-\d+)?")


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

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are here, oldest first; those set aside are not among them."""
        if not self.directory.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name[1]) for name in names if name)

    def set_aside(self) -> list[Path]:
        """Checkpoints that were found damaged, now or by an earlier start."""
        if not self.directory.is_dir():
            return []
        return sorted(path for path in self.directory.iterdir() if _DAMAGED.fullmatch(path.name))

    def path(self, step: int) -> Path:
        """Where the checkpoint after ``step`` updates is."""
        return self.directory / f"step-{step}"

    def save(
        self,
        step: int,
        model: nn.Module,
        method: Method,
        optimizer: Optimizer,
        progress: dict[str, Any],
        gathered: Gathered | None = None,
    ) -> Path:
        """Save after ``step`` updates, then delete what is older than the ``keep`` newest.

        Args:
            step: Updates made so far.
            model: The adapted model, unwrapped.
            method: Adds its own state.
            optimizer: The optimizer.
            progress: JSON-able facts that the run wants back.
            gathered: What model and optimizer hold, where this process has only parts of it.

        Raises:
            OSError: It could not be written; the older ones are untouched.
            RunFailed: What the disk gives back is not what was written; the older ones are untouched.
        """
        self.directory.mkdir(exist_ok=True)
        with new_directory(self.path(step)) as out, as_os_error():
            save_file(_trained(model) if gathered is None else gathered.trained, out / "trained.safetensors")
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state(model).items()}
            save_file(state, out / "method.safetensors")
            torch.save(optimizer.state_dict() if gathered is None else gathered.optimizer, out / "optimizer.pt")
            (out / "progress.json").write_text(json.dumps({"step": step, **progress}, indent=2) + "\n")
            write_manifest(out)
        # Before an older one goes: with `keep: 1` nothing else would be left.
        if wrong := damage(self.path(step), FILES, from_disk=True):
            aside = self._set_aside(step)
            raise RunFailed(
                f"the checkpoint after step {step} is not on the disk as it was written ({wrong}): now {aside.name}",
                help="the disk may be failing; older checkpoints were kept: continue with --resume on another disk",
            )
        for old in self.steps()[: -self.keep]:
            # Renamed first: a deletion that is cut short leaves no half checkpoint under a whole one's name.
            gone = self.directory / f".tmp-old-step-{old}-{token()}"
            os.replace(self.path(old), gone)
            shutil.rmtree(gone)
        return self.path(step)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, and a line for each newer one, which was damaged and is set aside.

        Raises:
            OSError: A damaged one cannot be renamed.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            wrong = self.wrong(step)
            if wrong is None:
                return self.path(step), damaged
            aside = self._set_aside(step)
            damaged.append(f"checkpoint step-{step} is damaged ({wrong}): set aside as {aside}")
        return None, damaged

    def wrong(self, step: int) -> str | None:
        """What is wrong with the checkpoint after ``step``; None where it is whole."""
        return damage(self.path(step), FILES)

    def _set_aside(self, step: int) -> Path:
        path = self.path(step)
        aside, count = path.with_name(f"{path.name}.damaged"), 1
        while aside.exists():
            count += 1
            aside = path.with_name(f"{path.name}.damaged-{count}")
        os.replace(path, aside)
        sync(self.directory)
        return aside

    def load(self, path: Path, model: nn.Module, method: Method, optimizer: Optimizer) -> Restored:
        """Put a checkpoint's state into a freshly built model and optimizer.

        Raises:
            RunFailed: The checkpoint was made by another model or method.
        """
        with _explained(path):
            progress = json.loads(read_regular(path / "progress.json", MAX_PROGRESS_BYTES))
            if not isinstance(progress, dict):
                raise ValueError("progress.json is no JSON object")
            if path.name != f"step-{progress.get('step')}":
                raise ValueError(f"progress.json is of step {progress.get('step')}")
            for name, kind in PROGRESS.items():
                if name in progress and (type(progress[name]) is not kind):
                    raise ValueError(f"progress.json: `{name}` is not of the type {kind.__name__}")
            self._load_model(path, model, method)
            optimizer.load_state_dict(read_tensors(path / "optimizer.pt"))
        return Restored(step=progress.pop("step"), path=path, progress=progress)

    @staticmethod
    def load_model(path: Path, model: nn.Module, method: Method) -> None:
        """Put what a checkpoint has of the model into a freshly adapted one.

        Raises:
            RunFailed: The checkpoint was made by another model or method, or cannot be read.
        """
        with _explained(path):
            Checkpoints._load_model(path, model, method)

    @staticmethod
    def _load_model(path: Path, model: nn.Module, method: Method) -> None:
        trained = load_file(path / "trained.safetensors")
        mine = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        if trained.keys() != mine.keys() or any(trained[name].shape != mine[name].shape for name in mine):
            raise RunFailed(f"{path} was saved from another model or method")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(trained[name])
        method.load_state(model, load_file(path / "method.safetensors"))


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what libraries raise for a checkpoint that a stranger wrote into one sentence."""
    try:
        yield
    except (FtuneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RunFailed(
            f"{path} cannot be loaded: {said}", help="take the checkpoint before it: rename this one, and --resume"
        ) from error


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that require grad, by name; tied ones appear once."""
    return {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
