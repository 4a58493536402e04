"""The run directory: its layout, and ``run.json``.

::

    RUN/run.json          recipe as written and as resolved, plan, measured, vitals, versions, device, status
    RUN/recipe.yaml       the recipe, overrides applied: what trains the same again
    RUN/metrics.jsonl     one event a line
    RUN/checkpoints/      step-N/, each complete
    RUN/adapter/          a PEFT adapter (or model/, a transformers model, for full fine-tuning)
    RUN/eval.json         what `ftune eval` measured
    RUN/predictions.jsonl every answer and its scores, of `ftune eval`
    RUN/tasks.jsonl       every item of a task and its scores, of `ftune eval --tasks`
    RUN/evaluations/      both of checkpoints and of scaled changes: step-N/eval.json, step-N-scale-0.5/eval.json
    RUN/merged/           what `ftune merge` made
    RUN/lora/             what `ftune convert` made
    RUN/.lock             held by whoever writes here (``ftune.run.lock``)
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ftune.artifacts.stored import RESTORE, explain, require_digests, require_record
from ftune.errors import RunDirError
from ftune.installed import version_of
from ftune.plan.pinned import repinned
from ftune.recipe.checks import check_stored
from ftune.recipe.removed import without_removed
from ftune.recipe.schema import Recipe
from ftune.regular import kind_of, read_regular, walk_irregular
from ftune.run.files import remove_leftovers, told, write_json
from ftune.run.lock import LOCK, RunLock
from ftune.scrub import scrub_data
from ftune.version import __version__

__all__ = ["RunDir", "package_versions"]

_OURS = (
    "run.json",
    "recipe.yaml",
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "model",
    "merged",
    "lora",
    "eval.json",
    "predictions.jsonl",
    "tasks.jsonl",
    "evaluations",
    "tracking",
)
NAME_A_RUN = "give the output_dir of a recipe that was trained"
MAX_RECORD_BYTES = 16_000_000
"""A larger ``run.json`` is not one that ftune wrote."""
_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "liger-kernel",
    "tokenizers",
    "safetensors",
    "pydantic",
)

_CHOSEN = {"training": ("epochs", "gradient_accumulation_steps"), "optimizer": ("learning_rate",)}
"""Fields that are chosen by the size of the data where a recipe leaves them out (``ftune.plan.defaults``)."""


def _length_written_out(recipe: Recipe) -> Recipe:
    """A run's recipe; of older runs `epochs` is left out where it was 1."""
    training = recipe.training
    if training.epochs is not None or training.max_steps is not None:
        return recipe
    return recipe.model_copy(update={"training": training.model_copy(update={"epochs": 1.0})})


def _foreign(path: Path) -> bool:
    """Whether ftune did not make it: the lock, and what a process left half written before its run.json, it did."""
    return path.name != LOCK and not path.name.startswith(".tmp-")


def package_versions() -> dict[str, str]:
    """Versions of ftune, Python and the packages that decide a run's numbers; those not installed are left out."""
    installed = {name: version for name in _PACKAGES if (version := version_of(name)) is not None}
    return {"ftune": __version__, "python": platform.python_version()} | installed


@dataclass(frozen=True)
class RunDir:
    """A run directory at ``root``."""

    root: Path

    @property
    def metrics(self) -> Path:
        """``metrics.jsonl``."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints' directory."""
        return self.root / "checkpoints"

    @property
    def record_path(self) -> Path:
        """``run.json``."""
        return self.root / "run.json"

    @property
    def tracking(self) -> Path:
        """Where trackers that write files write them."""
        return self.root / "tracking"

    @property
    def eval_path(self) -> Path:
        """``eval.json``."""
        return self.root / "eval.json"

    def evaluation(self, checkpoint: Path | None = None, scale: float = 1.0) -> Path:
        """Where the evaluation of the run, of one of its checkpoints, or of a scaled change is kept."""
        parts = [checkpoint.name] if checkpoint is not None else []
        parts += [f"scale-{scale:g}"] if scale < 1 else []
        return self.root / "evaluations" / "-".join(parts) if parts else self.root

    def owns(self, path: Path) -> bool:
        """Whether a path is of the run's own files, or of a name that they may have."""
        try:
            parts = path.resolve().relative_to(self.root.resolve()).parts
        except (ValueError, OSError, RuntimeError):
            return False
        return not parts or parts[0] in (*_OURS, LOCK) or parts[0].startswith(".tmp-")

    def exists(self) -> bool:
        """Whether a run was started here."""
        return os.path.lexists(self.record_path)

    def read(self) -> dict[str, Any]:
        """The content of ``run.json``.

        Raises:
            RunDirError: There is none, or it is not JSON.
        """
        try:
            data: dict[str, Any] = json.loads(read_regular(self.record_path, MAX_RECORD_BYTES))
        except FileNotFoundError:
            raise RunDirError(
                f"{self.root} is no run directory: it has no run.json",
                help=NAME_A_RUN,
            ) from None
        except NotADirectoryError:
            raise RunDirError(f"{self.root} is a file, not a run directory", help=NAME_A_RUN) from None
        except OSError as error:
            raise RunDirError(f"{self.record_path} cannot be read: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise RunDirError(f"{self.record_path} is damaged: {error}", help=RESTORE) from error
        require_record(data, self.record_path)
        return data

    def recipe(self) -> Recipe:
        """The recipe the run was made with, as resolved.

        Raises:
            RunDirError: It was written by another version whose recipes differ.
        """
        try:
            # As JSON, where a list is what a tuple is written as.
            resolved = json.dumps(without_removed(self.read()["resolved"]))
            recipe = _length_written_out(Recipe.model_validate_json(resolved))
        except ValidationError as error:
            raise RunDirError(
                f"the recipe in {self.record_path} does not fit this version of ftune:\n  "
                + "\n  ".join(f"resolved.{line}" for line in explain(error)),
                help=RESTORE,
            ) from error
        if problems := check_stored(recipe):
            lines = (f"resolved.{'.'.join(map(str, problem.loc))}: {problem.message}" for problem in problems)
            raise RunDirError(f"the recipe in {self.record_path} cannot work:\n  " + "\n  ".join(lines), help=RESTORE)
        return recipe

    def as_begun(self, recipe: Recipe) -> Recipe:
        """A recipe for this run, with all that a recipe may leave open as the run settled it at its start.

        What ``auto`` means is measured, so it may come out otherwise on another machine or another day; a branch of
        the hub moves on; and another version may choose another length or rate for so much data.

        Raises:
            RunDirError: As ``recipe`` does.
        """
        began, blocks = self.recipe(), {}
        recipe = repinned(recipe, self.read().get("pinned", {}))
        for block in ("model", "data", "training", "optimizer"):
            now, then = getattr(recipe, block), getattr(began, block)
            fields = [name for name in type(now).model_fields if getattr(now, name) == "auto"]
            fields += [name for name in _CHOSEN.get(block, ()) if getattr(now, name) is None]
            blocks[block] = now.model_copy(update={name: getattr(then, name) for name in fields})
        return recipe.model_copy(update=blocks)

    def base_names(self) -> set[str]:
        """How the base model may be called in what was trained: as it was found then, wherever it is now."""
        model = self.read()["resolved"].get("model") if self.exists() else None
        name = model.get("id") if isinstance(model, dict) else None
        return {name, Path(name).name} if isinstance(name, str) else set()

    def artifact(self, recipe: Recipe) -> Path:
        """Where the trained adapter or model is.

        Raises:
            RunDirError: The run is not finished.
        """
        path = self.root / recipe.method.artifact
        record = self.read() if self.exists() else {}
        kind = kind_of(path)
        if kind is None and not path.exists():
            raise RunDirError(
                f"{self.root} has no {recipe.method.artifact}/ yet: the run is {record.get('status', 'unknown')}",
                help="finish it with `ftune train RECIPE --resume`",
            )
        if kind != "a directory":
            raise RunDirError(f"{path} is {kind or 'a file'}, where a directory must be", help=RESTORE)
        require_digests(path, record.get("artifact_sha256", {}))
        return path

    def write(self, record: dict[str, Any]) -> None:
        """Replace ``run.json``; secrets are left out of it."""
        write_json(self.record_path, scrub_data(record))

    def require_plain(self) -> None:
        """Hold that whatever ftune reads or writes here is a file or a directory of its own.

        The run directory itself may be a link; inside, one could lead what is written to any file of the user's.

        Raises:
            RunDirError: Something is a link, a pipe, a socket or a device; the message names each.
        """
        wrong = []
        try:
            for name in (*_OURS, LOCK):
                for path, kind in walk_irregular(self.root / name):
                    if kind == "a link" and name == self.tracking.name and self._leads_inside(path):
                        continue  # trackers link to their newest run
                    wrong.append(f"{path.relative_to(self.root)} is {kind}")
        except OSError as error:
            raise RunDirError(f"cannot read the run: {error}") from error
        if wrong:
            more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise RunDirError(
                f"{self.root} holds what is neither a file nor a directory:\n  " + "\n  ".join(wrong[:10]) + more,
                help="ftune follows no links inside a run directory; `cp -rL RUN COPY` makes a copy without any, if "
                "you trust where they lead",
            )

    def _leads_inside(self, link: Path) -> bool:
        try:
            return link.resolve(strict=True).is_relative_to(self.root.resolve())
        except (OSError, RuntimeError):
            return False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keep training out of the run while it is read, and sweep away what a killed command left.

        Raises:
            RunDirError: It is being written, or holds links.
        """
        self.require_plain()
        with RunLock(self.root, shared=True):
            with contextlib.suppress(OSError):  # a run that may only be read
                self.sweep()
            with told("the command", self.root):
                yield

    def prepare(self, *, overwrite: bool, resume: bool) -> None:
        """Make the directory ready for a run.

        Raises:
            RunDirError: It holds another run, or files that are not a run's.
        """
        if self.exists() and not resume and not overwrite:
            raise RunDirError(
                f"{self.root} already holds a run",
                help="--resume continues it, --overwrite replaces it, or choose another output_dir",
            )
        self.require_plain()
        try:
            if not self.exists() and self.root.is_dir() and any(map(_foreign, self.root.iterdir())):
                raise RunDirError(
                    f"{self.root} is not empty and is no run directory",
                    help="choose another output_dir; ftune does not delete what it did not make",
                )
            self.root.mkdir(parents=True, exist_ok=True)
            # Tried, not asked: a full or read-only file system, and root's rights, show only so.
            with tempfile.TemporaryDirectory(dir=self.root, prefix=".tmp-"):
                pass
        except (OSError, RecursionError) as error:  # pathlib makes one directory inside of another by recursion
            raise RunDirError(f"cannot write the run: {error}", help="choose another output_dir") from error

    def sweep(self) -> None:
        """Delete what a killed process left half written; only by who holds the lock."""
        evaluations = self.root / "evaluations"
        of_checkpoints = sorted(evaluations.iterdir()) if kind_of(evaluations) == "a directory" else []
        for directory in (self.root, self.checkpoints, *of_checkpoints):
            if directory == self.root or kind_of(directory) == "a directory":
                remove_leftovers(directory)

    def contents(self) -> list[Path]:
        """What ftune made here, in the order in which it may be deleted: ``run.json`` goes last.

        Killed half-way, what is left is still known as a run. Of trackers each file is named, not their directory:
        those of a new run write beside the old one's files before these are deleted.
        """
        others = [self.root / name for name in reversed(_OURS) if name != self.tracking.name]
        return [*(path for path in self.tracking.rglob("*") if path.is_file()), *others]

    def clear(self, contents: Sequence[Path]) -> None:
        """Delete the run that was here: what ``contents`` gave, and nothing else."""
        for path in contents:
            shutil.rmtree(path) if kind_of(path) == "a directory" else path.unlink(missing_ok=True)
        if self.tracking.is_dir():
            for path in sorted(self.tracking.rglob("*"), reverse=True):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
