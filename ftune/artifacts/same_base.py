"""Whether a run's base model is still the one that it was trained on, and stays so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftune.artifacts.run_dir import RunDir
from ftune.errors import FtuneError, ModelError, RunDirError
from ftune.plan.fingerprint import fingerprint, text_fingerprint
from ftune.recipe.data_files import locate_data
from ftune.recipe.locate import locate_model
from ftune.recipe.schema import ModelSpec, Recipe

__all__ = ["base_of", "is_moved", "require_elsewhere", "require_inputs_elsewhere", "require_same_base"]


def base_of(record: dict[str, Any], what: str = "fingerprint") -> str | None:
    """A digest of its base in ``run.json``; None of a model of the hub, and in runs of older versions.

    Args:
        record: The content of ``run.json``.
        what: ``fingerprint``, of weights and configuration; ``tokenizer``; or ``chat_template``.
    """
    found: Any = record
    for key in ("plan", "model", what):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def is_moved(now: ModelSpec, then: ModelSpec, record: dict[str, Any]) -> bool:
    """Whether two model blocks differ in the path alone, and the same files lie at the new one."""
    known = base_of(record)
    if known is None or now.id == then.id or now != then.model_copy(update={"id": now.id}):
        return False
    return fingerprint(now) == known


def require_same_base(run: RunDir, recipe: Recipe) -> None:
    """Hold that a run's base on this disk has the weights, the tokenizer and the chat template that it was trained on.

    Args:
        run: A run.
        recipe: Its recipe, as resolved.

    Raises:
        RunDirError: There are others now.
        ModelError: There is no model now.
    """
    record = run.read()
    known = base_of(record)
    found = fingerprint(recipe.model) if known is not None else None
    if known is not None and found is None:  # `org/name` that is not on this disk would be one of the hub
        raise ModelError(
            f"there is no `{recipe.model.id}` here, the base model that {run.root} was trained on",
            help="start ftune where that path leads to it, or put the model, or a link to it, there",
        )
    if found != known:
        raise RunDirError(
            f"{run.root} was trained on other weights, or another config.json, than `{recipe.model.id}` holds now",
            help="put the base model back as it was, or train the recipe again with --overwrite",
        )
    now = text_fingerprint(recipe.model, recipe.data.chat_template)
    for what, digest, where in (
        ("tokenizer", now.tokenizer, recipe.model.id),
        ("chat template", now.chat_template, recipe.data.chat_template or recipe.model.id),
    ):
        known = base_of(record, what.replace(" ", "_"))
        if known is not None and digest != known:
            raise RunDirError(
                f"{run.root} was trained with another {what} than `{where}` holds now",
                help=f"put it back as it was (`{run.root / recipe.method.artifact}` holds the one that was trained "
                "with), or train the recipe again with --overwrite",
            )


def require_elsewhere(output: Path, run: RunDir | None, recipe: Recipe, option: str, usual: Path | None = None) -> None:
    """Hold that what a command is to write neither replaces the base model nor goes among the run's own files.

    Args:
        output: Where it is to go.
        run: The run.
        recipe: Its recipe.
        option: Which option says so, for the message.
        usual: Where it goes when nobody says where, which is always right.

    Raises:
        FtuneError: It does one or the other.
        ModelError: There is no model now.
    """
    if usual is not None and output.resolve() == usual.resolve():
        return
    if run is not None and run.owns(output):
        raise FtuneError(f"{output} is for the run's own files", help=f"name another place with {option}")
    located = locate_model(recipe.model)
    if located.kind == "hub" or not output.exists():
        return
    base = Path(located.path_or_id, located.gguf_file or "").resolve()
    if base.is_relative_to(output.resolve()) or (base.is_dir() and output.resolve().is_relative_to(base)):
        raise FtuneError(f"{output} is, or holds, the base model", help=f"name another place with {option}")


def require_inputs_elsewhere(run: RunDir, recipe: Recipe) -> None:
    """Hold that replacing a run does not delete the base model or the data that the new one needs.

    Args:
        run: The run that is to be replaced.
        recipe: The recipe of the new one.

    Raises:
        RunDirError: One of them is among the run's own files.
        FtuneError: There is no model, or no data.
    """
    model = locate_model(recipe.model)
    inputs = [] if model.kind == "hub" else [Path(model.path_or_id, model.gguf_file or "")]
    inputs += locate_data(recipe.data.train, "train").files
    inputs += locate_data(recipe.data.eval, "eval").files if recipe.data.eval is not None else ()
    inputs += [Path(recipe.data.chat_template).expanduser()] if recipe.data.chat_template is not None else []
    for path in inputs:
        if run.owns(path):
            raise RunDirError(
                f"{path} is of the run in {run.root}, and --overwrite would delete it before it is read",
                help="choose another output_dir, or move it out of the run",
            )
