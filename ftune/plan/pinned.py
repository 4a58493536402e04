"""Hub models and data sets by commit: a branch moves, and a run resumed or evaluated later must meet the same files."""

from __future__ import annotations

from typing import Any, cast

from ftune.data.splits import Splits
from ftune.recipe.locate import locate_model
from ftune.recipe.schema import DataSource, DataSpec, ModelSpec, Recipe

__all__ = ["pin_data", "pin_model", "pins", "repinned"]

_SOURCES = ("train", "eval")


def pin_model(spec: ModelSpec) -> ModelSpec:
    """A hub model with the commit that its revision stands for now; what is on this disk as it is.

    Raises:
        ModelError: The hub does not answer and the local cache does not have the model.
    """
    located = locate_model(spec)
    if located.kind != "hub":
        return spec
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    from ftune.plan.unreadable import explained

    with explained(spec, "configuration"):
        # The file is needed anyway; its place in the cache, snapshots/COMMIT/, says which commit it is of.
        found = cached_file(located.path_or_id, located.gguf_file or "config.json", revision=located.revision)
    commit = extract_commit_hash(cast(str, found), None)
    return spec if commit is None else spec.model_copy(update={"revision": commit})


def pin_data(data: DataSpec, splits: Splits) -> DataSpec:
    """Hub data sets with the commit that their rows came from."""
    update: dict[str, DataSource] = {}
    for name, split in (("train", splits.train), ("eval", splits.eval)):
        source = getattr(data, name)
        if source is not None and split is not None and split.rows.commit is not None:
            update[name] = source.model_copy(update={"revision": split.rows.commit})
    return data.model_copy(update=update)


def pins(asked: Recipe, planned: Recipe) -> dict[str, Any]:
    """What was asked for and what it was pinned to, by field, for ``run.json``."""
    pairs = [("model", asked.model, planned.model)]
    pairs += [(f"data.{name}", getattr(asked.data, name), getattr(planned.data, name)) for name in _SOURCES]
    return {
        name: {"asked": old.revision, "commit": new.revision}
        for name, old, new in pairs
        if old is not None and new.revision is not None
    }


def repinned(recipe: Recipe, pinned: dict[str, Any]) -> Recipe:
    """A recipe with the commits that a run has pinned, wherever it still asks for the same revision."""

    def again(name: str, block: Any) -> Any:
        pin = pinned.get(name)
        if block is None or pin is None or block.revision != pin["asked"]:
            return block
        return block.model_copy(update={"revision": pin["commit"]})

    sources = {name: again(f"data.{name}", getattr(recipe.data, name)) for name in _SOURCES}
    return recipe.model_copy(
        update={"model": again("model", recipe.model), "data": recipe.data.model_copy(update=sources)}
    )
