"""A longer context by scaled rotary positions: set before a model is built, kept beside what was trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from ftune.errors import ModelError

__all__ = ["Scaling", "extend", "require_positions", "save_positions"]

Scaling = Literal["linear", "yarn", "none"]

_FILE = "ftune.json"


def extend(config: Any, length: int, scaling: Scaling) -> None:
    """Set a configuration's rotary positions and its longest row; the model built from it has them.

    Args:
        config: Of a transformers model; changed in place.
        length: Tokens of the longest row from now on.
        scaling: ``linear`` interpolates positions (arXiv:2306.15595), ``yarn`` scales by frequency
            (arXiv:2309.00071), ``none`` leaves them.

    Raises:
        ModelError: The model has no rotary positions, scales them already or by layer, or is as long as asked.
    """
    text, kind = config.get_text_config(), config.model_type
    rope: Any = getattr(text, "rope_parameters", None)
    original = text.max_position_embeddings
    refusal = None
    if not rope:
        refusal = f"{kind} has no rotary positions: its context cannot be extended"
    elif "rope_theta" not in rope:
        refusal = f"{kind} has other rotary positions in each kind of layer, which `context_length` cannot extend"
    elif rope.get("rope_type", "default") != "default":
        refusal = f"this model scales its rotary positions already ({rope['rope_type']})"
    elif length <= original:
        refusal = f"the context of this model is {original} tokens already"
    if refusal is not None:
        raise ModelError(refusal, help="leave out `context_length`")
    if scaling != "none":
        text.rope_parameters = rope | {"rope_type": scaling, "factor": length / original}
    if scaling == "yarn":
        # Left out, transformers would take the extended length for the original one.
        text.rope_parameters["original_max_position_embeddings"] = original
    text.max_position_embeddings = length
    try:
        # Changed in place, a configuration is checked only when it is saved.
        type(config).from_dict(config.to_dict())
    except Exception as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"{kind} cannot scale its rotary positions by `rope: {scaling}`: {reason}",
            help="leave out `context_length`",
        ) from error


def save_positions(config: Any, out: Path) -> None:
    """Write the positions beside an adapter: PEFT's files say nothing of the base's configuration."""
    (out / _FILE).write_text(json.dumps(_positions(config), indent=2, sort_keys=True) + "\n")


def require_positions(config: Any, directory: Path) -> None:
    """Hold that a base has the positions that the adapter in ``directory`` was trained on.

    Raises:
        ModelError: It has others; the adapter would be off by more than it learned.
    """
    file = directory / _FILE
    if file.exists() and json.loads(file.read_text()) != _positions(config):
        raise ModelError(
            f"the adapter in {directory} was trained on other positions than this base has",
            help=f"build the base with the values in {file.name}, as ftune does from the run's recipe",
        )


def _positions(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    return {
        "max_position_embeddings": text.max_position_embeddings,
        "rope_parameters": getattr(text, "rope_parameters", None),
    }
