"""The tokens that end a turn, as the training rows teach them.

What a tokenizer calls its end of sequence is often another token than the one a chat template puts behind an answer.
A model that learned the template's goes on after it, unless generation stops there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ftune.data.chat import apply_template, load_template, special_tokens
from ftune.data.encode import Encoder
from ftune.data.examples import Examples
from ftune.data.formats import Conversation, Message, convert
from ftune.data.spans import render
from ftune.data.splits import Split
from ftune.errors import DataError
from ftune.recipe.schema import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["end_text", "learned_ends", "template_end"]

RENDERED = 200  # rows that are rendered where the labels do not tell where a turn ends
INSIDE = 0.05
"""Share of a token's places inside of trained turns above which it ends no turn: some templates put the end of a
message between reasoning and answer. A little is allowed, since a row's text may hold any token."""


def learned_ends(split: Split, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> tuple[int, ...]:
    """Ids of the tokens that end the trained turns of a split, the most frequent first.

    Added tokens only, special or not; white space behind one does not hide it. A token that also stands inside of
    turns ends none. Empty where no turn ends with such a token, and for plain text, which ends with the end of
    sequence.
    """
    added = set(special_tokens(tokenizer).values()) | set(tokenizer.added_tokens_decoder)
    if spec.train_on != "all":
        assert isinstance(split.examples, Examples)
        ends, inside = _from_labels(split.examples, tokenizer)
    else:
        ends, inside = _from_texts(split, tokenizer, spec, added)
    return tuple(
        token
        for token, count in ends.most_common()
        if token in added and inside[token] <= INSIDE * (count + inside[token])
    )


def template_end(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> tuple[int, ...]:
    """The id of the token that the chat template puts behind an answer; empty where there is none.

    Args:
        tokenizer: With the template, where no file replaces it.
        chat_template: The path of a file with the template.
    """
    template = load_template(tokenizer, chat_template)
    if template is None or template.end_of_turn is None:
        return ()
    return (special_tokens(tokenizer)[template.end_of_turn],)


def end_text(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> str | None:
    """What the chat template writes behind an answer where that is no token of the tokenizer.

    ChatML on a tokenizer that does not know ``<|im_end|>`` learns it letter by letter; no token can stop it.

    Args:
        tokenizer: With the template, where no file replaces it.
        chat_template: The path of a file with the template.

    Returns:
        The first line of it; None where a token ends a turn, or nothing does.
    """
    template = load_template(tokenizer, chat_template)
    if template is None or template.end_of_turn is not None:
        return None
    mark = "\ue000said\ue001"
    turns: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    try:
        text = apply_template(turns, Conversation(tuple(turns), row=0), tokenizer, template)
    except DataError:  # it refuses this exchange, and may take the data's
        return None
    behind = text.partition(mark)[2].strip()
    if not behind or any(behind.startswith(token.content) for token in tokenizer.added_tokens_decoder.values()):
        return None
    return behind.splitlines()[0].rstrip()


def _from_labels(examples: Examples, tokenizer: PreTrainedTokenizerBase) -> tuple[Counter[int], Counter[int]]:
    """How often each token ends a run of trained tokens, and how often it stands inside of one."""
    ids, trained = examples.ids, examples.trained
    follows = np.append(trained[1:], False)
    follows[np.cumsum(examples.lengths) - 1] = False  # the next token is another example's
    starts = np.append(True, ~trained[:-1])
    starts[(np.cumsum(examples.lengths) - examples.lengths)[: len(examples)]] = True
    last = np.flatnonzero(trained & ~follows)
    blank = _blank(np.unique(ids[last]), tokenizer)
    while len(back := np.flatnonzero(np.isin(ids[last], blank) & ~starts[last])):
        last[back] -= 1
    behind = np.zeros(len(ids), dtype=np.bool_)
    behind[last] = True
    return _counts(ids[last]), _counts(ids[trained & ~behind])


def _counts(ids: NDArray[np.int32]) -> Counter[int]:
    values, counts = np.unique(ids, return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _blank(ids: Iterable[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that are nothing but white space."""
    return [int(i) for i in ids if not tokenizer.decode([int(i)], skip_special_tokens=False).strip()]


def _from_texts(
    split: Split, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, added: set[int]
) -> tuple[Counter[int], Counter[int]]:
    """The same from rendered conversations, where every token is trained."""
    ends: Counter[int] = Counter()
    inside: Counter[int] = Counter()
    template = load_template(tokenizer, spec.chat_template) if split.format != "text" else None
    if template is None:
        return ends, inside
    encoder = Encoder(tokenizer, template, train_on="all", max_length=spec.max_length, too_long="skip")
    step = max(1, len(split.rows) // RENDERED)
    rows = split.rows.select(list(split.rows.numbers)[::step])
    for record in convert(rows, split.format, chat_template=True):
        if isinstance(record, Conversation):
            found = render(encoder.prepared(record), tokenizer, template)
            turns = [found.text[start:end].rstrip() for start, end in found.spans]
            for ids in tokenizer(turns, add_special_tokens=False)["input_ids"] if turns else []:
                ends[ids[-1]] += 1
                inside.update(token for token in ids[:-1] if token in added)
    return ends, inside
