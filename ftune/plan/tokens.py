"""Whether a tokenizer belongs to its model: every token it gives has a row in the embedding."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ftune.errors import ModelError

__all__ = ["markers_without_token", "require_rows"]

# How nearly all chat templates write the tokens that frame a turn.
_MARKER = re.compile(r"<\|[A-Za-z0-9_]+\|>")


def require_rows(tokenizer: Any, model: Any, name: str) -> None:
    """Hold that the embedding, and the output head, have a row for every token.

    Args:
        tokenizer: A fast tokenizer of transformers.
        model: The causal language model, on any device.
        name: The model's, for messages.

    Raises:
        ModelError: Names both sizes, and the first tokens that have none.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if weight is not None:
        rows = min(rows, int(weight.shape[0]))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
    if not beyond:
        return
    first = ", ".join(f"`{token}` ({number})" for number, token in beyond[:3])
    more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
    raise ModelError(
        f"the tokenizer of `{name}` has {beyond[-1][0] + 1} tokens, and the model's embedding {rows} rows: none for "
        f"{first}{more}",
        help="take the tokenizer that the model was trained with, or grow the model with transformers' "
        "`resize_token_embeddings` and save it",
    )


def markers_without_token(tokenizer: Any, name: str) -> Iterator[str]:
    """Yield a warning for what a chat template frames turns with and the tokenizer has no token for.

    Args:
        tokenizer: With the chat template that is trained with.
        name: The model's, for messages.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return
    vocabulary = tokenizer.get_vocab()
    lost = [marker for marker in dict.fromkeys(_MARKER.findall(template)) if marker not in vocabulary]
    if lost:
        pieces = len(tokenizer(lost[0], add_special_tokens=False)["input_ids"])
        named = ", ".join(f"`{marker}`" for marker in lost[:4]) + (f" and {len(lost) - 4} more" if lost[4:] else "")
        yield (
            f"the chat template writes {named}, for which the tokenizer of {name} has no token: `{lost[0]}` is "
            f"{pieces} tokens of text"
        )
