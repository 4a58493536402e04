"""How many tokens a model has positions for, where it keeps a table of them.

Rotary positions go on behind what a model was trained on; a learned table, and some masks and biases, end. Which of
these a model has is tried on a small random one of its configuration whose stated length is short.
"""

from __future__ import annotations

import re
from typing import Any

from ftune.errors import ModelError
from ftune.plan.causal import small_config, small_model

__all__ = ["beyond_context", "check_positions", "context_of_model", "positions"]

SHORT = 12
"""Tokens that the small model is said to have positions for; it is asked for twice as many."""
_LENGTH = re.compile(r"position|seq_len|sequence_length|^n_ctx$|context_length")
_known: dict[str, int | None] = {}


def positions(config: Any) -> int | None:
    """Tokens after which a model has no more positions; None where they do not end, or none could be tried.

    Args:
        config: A configuration of transformers; it is not changed.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _known:
        text = config.get_text_config()
        stated = {
            name: value
            for name, value in vars(text).items()
            if _LENGTH.search(name) and isinstance(value, int) and not isinstance(value, bool) and value > 1
        }
        _known[key] = min((value for name, value in stated.items() if _ends(config, name)), default=None)
    return _known[key]


def context_of_model(config: Any) -> int | None:
    """Tokens that prompt and answer may have together: all positions, or as many as the model says it has."""
    stated = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions(config) or stated


def check_positions(config: Any, name: str, longest: int, ahead: int = 0) -> None:
    """Hold that the longest row has a position for each token.

    Args:
        config: The model's configuration.
        name: The model's, for messages.
        longest: Tokens of the longest row.
        ahead: Positions that the method's own tokens take.

    Raises:
        ModelError: It has not.
    """
    found = positions(config)
    if found is None or longest + ahead <= found:
        return
    own = f", of which the method takes {ahead}" if ahead else ""
    way = "leave out the method's virtual tokens" if found <= ahead else f"set `data.max_length: {found - ahead}`"
    raise ModelError(f"`{name}` has {found} positions{own}, and the longest row has {longest} tokens", help=way)


def beyond_context(config: Any, longest: int) -> tuple[str, ...]:
    """What to tell of examples that are longer than the model says it was made for, where its positions do not end.

    Args:
        config: The model's configuration.
        longest: Tokens of the longest example.
    """
    made_for = context_of_model(config)
    if made_for is None or longest <= made_for:
        return ()
    return (
        f"the longest example has {longest:,} tokens, and the model was made for {made_for:,}: what stands behind them "
        "is new to it; lower `data.max_length`, or extend the model with `method: longlora` and `context_length`",
    )


def _ends(config: Any, name: str) -> bool:
    """Whether a model whose setting of that name is small takes so many tokens and not twice as many."""
    import torch

    try:
        small = small_config(config)
        setattr(small.get_text_config(), name, SHORT)
        with small_model(small) as model, torch.no_grad():
            if model is None:
                return False
            model.eval()(input_ids=torch.ones(1, SHORT, dtype=torch.long), use_cache=False)
    except Exception:  # sizes that do not go together, in one of many ways
        return False
    try:
        with torch.no_grad():
            model(input_ids=torch.ones(1, 2 * SHORT, dtype=torch.long), use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return True
    return False
