"""Runs whose weights are gone: a study may be copied, or kept in a repository, without any.

What was measured stays as it is. Of what is still to be measured, a run that was not tested yet is trained anew in its
place. For a run that was tested (tasks or rewind may be asked for later) it is done in ``STUDY/again/LABEL/NAME``: what
the report says of its test rows was measured on the weights that are gone, so their record stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ftune.artifacts.run_dir import RunDir
from ftune.experiments.pool import Job
from ftune.experiments.trials import Trials, read_json
from ftune.run.checkpoint import FILES, Checkpoints
from ftune.run.files import write_json

__all__ = ["again", "again_job", "has_weights", "keep_size", "needs_new_start", "run_with_weights", "size_of"]


def has_weights(run: Path) -> bool:
    """Whether what a finished run trained is there, whole."""
    record = read_json(run / "run.json")
    if record.get("status") != "finished":
        return False
    artifact = run / record["plan"]["method"]["artifact"]
    names = record.get("artifact_sha256") or {}  # older runs have none
    return any(artifact.rglob("*.safetensors")) and all((artifact / name).is_file() for name in names)


def needs_new_start(run: Path) -> bool:
    """Whether a run has begun and cannot go on, or be read: its weights are gone."""
    record = read_json(run / "run.json")
    if not record:
        return False
    if record.get("status") == "finished":
        return not has_weights(run)
    checkpoints = Checkpoints(RunDir(run).checkpoints, 1)
    return not any(all((checkpoints.path(step) / name).is_file() for name in FILES) for step in checkpoints.steps())


def again(trials: Trials, label: str, name: str) -> Path:
    """Where a run that was tested is trained again."""
    return trials.root / "again" / label / name


def run_with_weights(trials: Trials, label: str, name: str) -> Path | None:
    """Where the weights of a run are: its own, or those that were trained again; None where there are none."""
    places = (trials.run(label, name), again(trials, label, name))
    return next((run for run in places if has_weights(run)), None)


def again_job(trials: Trials, label: str, name: str, pauses: Sequence[int]) -> Job | None:
    """Train a run again that was tested; None where that has failed.

    Args:
        trials: The study's runs.
        label: Of the method.
        name: Of the run.
        pauses: Steps at which it pauses, as it did when it was tuned: checkpoints stay there.
    """
    job = f"{name}-again"
    if trials.failure(label, job).is_file():
        return None
    recipe, out = trials.recipe(label, name), again(trials, label, name)
    message = {"kind": "train", "recipe": str(recipe), "until": None, "out": str(out), "pauses": list(pauses)}
    return Job(label, job, message)


def keep_size(trials: Trials, label: str, name: str) -> None:
    """Write down the bytes of a tested run's weights, as long as they are there."""
    run, kept = trials.run(label, name), trials.test(label, name) / "size.json"
    if kept.is_file() or not has_weights(run):
        return
    artifact = run / read_json(run / "run.json")["plan"]["method"]["artifact"]
    write_json(kept, {"bytes": sum(file.stat().st_size for file in artifact.rglob("*.safetensors"))})


def size_of(trials: Trials, label: str, name: str) -> int | None:
    """The bytes of a tested run's weights; None where they went before they were written down."""
    keep_size(trials, label, name)
    found: int | None = read_json(trials.test(label, name) / "size.json").get("bytes")
    if found is not None:
        return found
    # A study of an older version has them in its report alone.
    run = f"runs/{label}/{name}"
    for method in read_json(trials.root / "compare.json").get("methods", ()):
        if method["runs"] and method["runs"][0]["run"] == run:
            found = method["costs"]["size"]
    return found
