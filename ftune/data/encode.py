"""Records as token ids with what is trained of them.

An ``Encoder`` and what it is given and returns can be sent to another process; see ``workers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ftune.data.chat import ChatTemplate, Span, render, special_tokens
from ftune.data.examples import Examples, Ids
from ftune.data.formats import Conversation, Plain, Record
from ftune.data.huge import HUGE, Bound, bound_of, require_memory
from ftune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "Part", "RowError", "encodable"]

# ids and what is trained; or, of a row that is left out untokenized, how many tokens it has at least
Encoded = tuple[Ids, NDArray[np.bool_]] | int


class RowError(Exception):
    """Why one row cannot be encoded; whoever knows the rows says where it is.

    Args:
        row: The row's number in its source; None where it is no matter of one row.
        message: What is wrong.
        help: How to mend it.
    """

    def __init__(self, row: int | None, message: str, help: str | None) -> None:
        # all of it in args, which is what survives the way to another process
        super().__init__(row, message, help)
        self.row, self.message, self.help = row, message, help


@dataclass(frozen=True)
class Part:
    """What some of the records became.

    Attributes:
        examples: Those that are kept, cut to ``max_length``.
        too_long: (row, tokens) of those longer than that; of huge ones, the least that the tokens can be.
        first_targets: Of the examples without a target after the cut, where the first one was before it.
        truncated: Examples that are kept and were cut.
        no_target: Examples left out because no trained token was left in them.
        ended: Examples kept as they were whose last trained token is a special token.
        longest_before: Tokens of the longest, before the cut; at least, where it is a huge one that is left out.
    """

    examples: Examples
    too_long: tuple[tuple[int, int], ...]
    first_targets: tuple[int, ...]
    truncated: int
    no_target: int
    ended: int
    longest_before: int


class Encoder:
    """Records to token ids and what is trained of them, many at a time.

    Args:
        tokenizer: A fast one.
        template: For conversations.
        train_all: Every token is trained.
        max_length: Tokens that are kept of an example.
        keep_long: Whether longer ones are cut, and not left out.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate | None,
        *,
        train_all: bool,
        max_length: int,
        keep_long: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._train_all = train_all
        self._max_length = max_length
        self._keep_long = keep_long
        self._ends = frozenset(special_tokens(tokenizer).values())
        # a model that expects a first token expects it before plain text as well; templates write it
        # themselves
        empty = tokenizer("", add_special_tokens=True)["input_ids"]
        bos = tokenizer.bos_token_id
        self.bos: list[int] = [bos] if bos is not None and empty[:1] == [bos] else []

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added."""
        return self._tokenized(texts)["input_ids"] if texts else []

    def encode(self, records: Sequence[Record]) -> Part:
        """Every record as an example, in order.

        Raises:
            RowError: A record cannot be rendered, or the tokenizer lacks what it needs.
        """
        plain = iter(self._plain([record for record in records if isinstance(record, Plain)]))
        chats = iter(self._conversations([record for record in records if isinstance(record, Conversation)]))
        encoded = [next(plain if isinstance(record, Plain) else chats) for record in records]
        return self._part(records, encoded)

    def _tokenized(self, texts: Sequence[str], **wanted: bool) -> Any:
        return self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **wanted
        )

    @cached_property
    def _bound(self) -> Bound | None:
        """How much text a token can stand for; found out when there is a huge text."""
        return bound_of(self._tokenizer)

    def _surely_too_long(self, row: int, *texts: str) -> int:
        """How many tokens the texts have at least, where that alone leaves the row out; 0 where they are tokenized.

        Raises:
            RowError: They must be tokenized, and memory does not suffice.
        """
        if sum(map(len, texts)) < HUGE:
            return 0
        if not self._keep_long:
            # each rounded up: the texts are tokenized apart
            least = sum(self._bound.least(text) for text in texts) if self._bound is not None else 0
            if least > self._max_length:
                return least
        try:
            require_memory(sum(len(text.encode()) for text in texts))
        except DataError as error:
            raise RowError(row, error.message, error.help) from error
        return 0

    def _plain(self, records: list[Plain]) -> list[Encoded]:
        """Prompt, completion and end-of-sequence token.

        Prompt and completion are tokenized apart, as the prompt stands alone when the model generates.
        """
        if not records:
            return []
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise RowError(None, "plain text ends with an end-of-sequence token, and the tokenizer has none", help=None)
        examples: list[Encoded] = []
        out = [self._surely_too_long(record.row, record.prompt, record.completion) for record in records]
        prompts = self.ids(["" if least else record.prompt for record, least in zip(records, out, strict=True)])
        completions = self.ids(["" if least else record.completion for record, least in zip(records, out, strict=True)])
        for prompt, completion, least in zip(prompts, completions, out, strict=True):
            if least:
                examples.append(least)
                continue
            context = [*self.bos, *prompt]
            end = [] if completion[-1:] == [eos] else [eos]
            ids = np.array([*context, *completion, *end], dtype=np.int32)
            examples.append((ids, np.arange(len(ids)) >= len(context)))
        return examples

    def _conversations(self, records: list[Conversation]) -> list[Encoded]:
        """The whole rendered text tokenized at once: the ids that the model meets when it is used."""
        if not records:
            return []
        if self._template is None:
            raise RowError(
                records[0].row,
                "messages need a chat template, and the tokenizer has none",
                help="name a Jinja file as `data.chat_template`, or give the data as strings",
            )
        texts: list[str] = []
        spans: list[list[Span]] = []
        out: list[int] = []
        for record in records:
            try:
                text, trained = render(record, self._tokenizer, self._template)
                text = encodable(text)
            except DataError as error:
                raise RowError(record.row, error.message, error.help) from error
            # only the whole text: a template may leave out what the row says
            out.append(self._surely_too_long(record.row, text))
            texts.append("" if out[-1] else text)
            spans.append(trained)
        encoded = self._tokenized(texts, return_offsets_mapping=True)
        return [
            least or (np.array(ids, dtype=np.int32), _inside(offsets, trained))
            for least, ids, offsets, trained in zip(
                out, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
            )
        ]

    def _part(self, records: Sequence[Record], encoded: list[Encoded]) -> Part:
        """Cut what is too long, leave out what has no target, count both."""
        kept: list[tuple[Ids, NDArray[np.bool_], int]] = []
        too_long: list[tuple[int, int]] = []
        first_targets: list[int] = []
        truncated = no_target = ended = 0
        longest = 0
        for record, found in zip(records, encoded, strict=True):
            if isinstance(found, int):
                longest = max(longest, found)
                too_long.append((record.row, found))
                continue
            ids, trained = found
            longest = max(longest, len(ids))
            if self._train_all:
                trained = np.ones_like(trained)
            cut = len(ids) > self._max_length
            if cut:
                too_long.append((record.row, len(ids)))
                if not self._keep_long:
                    continue
            if not trained[1 : self._max_length].any():
                no_target += 1
                first_targets += [1 + int(i) for i in np.flatnonzero(trained[1:])[:1]]
                continue
            truncated += cut
            ended += not cut and int(ids[np.flatnonzero(trained)[-1]]) in self._ends
            kept.append((ids[: self._max_length], trained[: self._max_length], record.row))
        examples = Examples(
            np.concatenate([ids for ids, _, _ in kept] or [np.zeros(0, np.int32)]),
            np.concatenate([trained for _, trained, _ in kept] or [np.zeros(0, np.bool_)]),
            np.array([len(ids) for ids, _, _ in kept], dtype=np.int64),
            np.array([row for _, _, row in kept], dtype=np.int64),
        )
        return Part(examples, tuple(too_long), tuple(first_targets), truncated, no_target, ended, longest)


def encodable(text: str) -> str:
    """A rendered text as it is; a ``tools`` string may bring in what no reader of files has seen.

    Raises:
        DataError: It holds half of a surrogate pair, which tokenizers refuse without saying where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"the rendered conversation holds {escape}, half of a surrogate pair, which is no character",
            help="write both halves of the pair, or the character itself in UTF-8",
        ) from error
    return text


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens have a character inside a span: (L,) bool."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    inside = np.zeros(len(starts), dtype=np.bool_)
    for start, end in spans:
        inside |= (starts < end) & (ends > start) & (ends > starts)
    return inside
