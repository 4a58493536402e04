"""Rows as token ids and labels, with the counts that a run is judged by.

``labels[i]`` is the token at ``i`` where it is trained, else -100; the shift by one happens in the loss, and
an example's first token is never a target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ftune.data.chat import ChatTemplate, Span, generation_prompt, load_template, render, special_tokens
from ftune.data.formats import SHOWN, Conversation, Format, Plain, Record, convert, resolve_format
from ftune.data.sources import Rows, load_rows
from ftune.errors import DataError
from ftune.recipe.schema import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE",
    "Example",
    "GenerationItem",
    "Split",
    "Splits",
    "Stats",
    "generation_items",
    "load_splits",
    "tokenize_split",
]

IGNORE = -100
Ids: TypeAlias = NDArray[np.int32]
# rows tokenized in one call: enough to keep the tokenizer busy, few enough that their offsets stay small
CHUNK = 1000


@dataclass(frozen=True, slots=True)
class Example:
    """One document.

    Attributes:
        input_ids: (L,) int32.
        labels: (L,) int32, the token itself where it is trained, else -100.
        row: The row's number in its source, counted from 0.
    """

    input_ids: Ids
    labels: Ids
    row: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def target_tokens(self) -> int:
        """Targets after the shift."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))


@dataclass(frozen=True)
class Stats:
    """Counts of a split; all but ``rows`` and ``longest_before`` speak of the examples that were kept.

    Attributes:
        rows: Rows of the source.
        examples: Rows that became examples.
        tokens: Tokens.
        target_tokens: Tokens in the loss.
        truncated: Examples cut to ``max_length``.
        skipped: Rows left out for being longer than ``max_length``.
        no_target: Rows left out because no trained token was left in them.
        ends_with_eos: Share of the untruncated examples whose last trained token is a special token (end of
            turn or end of sequence); 0 where none is untruncated.
        longest: Tokens of the longest example.
        longest_before: Tokens of the longest row, before truncation.
    """

    rows: int
    examples: int
    tokens: int
    target_tokens: int
    truncated: int
    skipped: int
    no_target: int
    ends_with_eos: float
    longest: int
    longest_before: int


@dataclass(frozen=True)
class Split:
    """The examples of one source.

    Attributes:
        examples: In the source's order; rows without a trained token are not among them.
        format: How the rows were read.
        stats: Counts.
        fingerprint: sha256 over ids, labels and row numbers.
        rows: The rows themselves, for ``generation_items``.
    """

    examples: tuple[Example, ...]
    format: Format
    stats: Stats
    fingerprint: str
    rows: Rows


@dataclass(frozen=True)
class Splits:
    """What is trained on and what is held out."""

    train: Split
    eval: Split | None


@dataclass(frozen=True, slots=True)
class GenerationItem:
    """A prompt to generate from, and the answer that the data gives.

    Attributes:
        prompt_ids: (L,) int32, with the generation prompt.
        reference: The answer, without special tokens.
        row: The row's number in its source.
    """

    prompt_ids: Ids
    reference: str
    row: int


def load_splits(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, seed: int) -> Splits:
    """Read and tokenize the training rows and those held out.

    With ``eval_fraction`` and no eval source, rows are drawn by seed and held out whole.

    Raises:
        DataError: Anything in the data that cannot be trained on.
    """
    train = load_rows(spec.train)
    format = resolve_format(train, spec.train.format)
    held_out: Rows | None = None
    held_out_format = format
    if spec.eval is not None:
        held_out = load_rows(spec.eval)
        held_out_format = resolve_format(held_out, spec.eval.format)
    elif spec.eval_fraction > 0:
        train, held_out = _hold_out(train, spec.eval_fraction, seed)
    return Splits(
        train=tokenize_split(train, tokenizer, spec, format),
        eval=tokenize_split(held_out, tokenizer, spec, held_out_format) if held_out is not None else None,
    )


def _hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Two disjoint parts of the rows: what is left to train on, and at least one row held out."""
    if len(rows) < 2:
        raise DataError(f"{rows.origin[0]}: one row cannot be split by `eval_fraction`")
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    # RandomState's stream is frozen across NumPy versions, the Generator's is not
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, len(rows)))))
    drawn = random.permutation(len(rows))
    numbers = [int(n) for n in np.asarray(rows.numbers)[drawn]]
    return rows.select(numbers[count:]), rows.select(numbers[:count])


def tokenize_split(rows: Rows, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, format: Format) -> Split:
    """Turn every row into an example, or say why it cannot be one.

    Raises:
        DataError: A slow tokenizer, rows that do not fit, rows too long under ``too_long: error``, or nothing
            left to train on.
    """
    template = _template(tokenizer, spec, format, rows)
    records = convert(rows, format, chat_template=template is not None)
    encoder = _Encoder(tokenizer, template, train_all=spec.train_on == "all")
    ends = np.array(sorted(special_tokens(tokenizer).values()), dtype=np.int32)
    examples: list[Example] = []
    too_long: list[tuple[int, int]] = []  # (row, tokens)
    first_targets: list[int] = []  # of the rows left without a target: where the first one would have been
    truncated = no_target = skipped = longest_before = untruncated = ended = 0
    for example in encoder.encode(records, rows):
        length = len(example)
        longest_before = max(longest_before, length)
        cut = length > spec.max_length
        if cut:
            too_long.append((example.row, length))
            if spec.too_long != "truncate":
                skipped += 1
                continue
        kept = Example(example.input_ids[: spec.max_length], example.labels[: spec.max_length], example.row)
        if kept.target_tokens == 0:
            no_target += 1
            targets = np.flatnonzero(example.labels[1:] != IGNORE)
            first_targets += [int(targets[0]) + 1] if len(targets) else []
            continue
        truncated += cut
        if not cut:
            untruncated += 1
            ended += bool(np.isin(kept.labels[kept.labels != IGNORE][-1], ends))
        examples.append(kept)
    if too_long and spec.too_long == "error":
        raise _too_long(too_long, rows, spec)
    if not examples:
        raise _nothing_left(rows, spec, [length for _, length in too_long], first_targets)
    stats = Stats(
        rows=len(rows),
        examples=len(examples),
        tokens=sum(map(len, examples)),
        target_tokens=sum(example.target_tokens for example in examples),
        truncated=truncated,
        skipped=skipped,
        no_target=no_target,
        ends_with_eos=ended / untruncated if untruncated else 0.0,
        longest=max(map(len, examples)),
        longest_before=longest_before,
    )
    return Split(tuple(examples), format, stats, _fingerprint(examples), rows)


def generation_items(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    spec: DataSpec,
    format: Format,
    limit: int | None = None,
) -> list[GenerationItem]:
    """Prompts and reference answers of the first ``limit`` rows.

    The prompt is everything before the last assistant turn, with the generation prompt, or a plain prompt; it
    is not cut to ``max_length``.

    Raises:
        DataError: The format has no answers (``text``), or a conversation begins with its last assistant
            turn.
    """
    if format == "text":
        raise DataError(
            f"{rows.origin[0]}: format `text` has no prompts and answers to generate from",
            help="remove `evaluation.metrics`, or use another format for data.eval",
        )
    rows = rows.select(rows.numbers[:limit])
    template = _template(tokenizer, spec, format, rows)
    encoder = _Encoder(tokenizer, template, train_all=False)
    prompts: list[str] = []
    references: list[str] = []
    records = convert(rows, format, chat_template=template is not None)
    for record in records:
        if isinstance(record, Plain):
            prompts.append(record.prompt)
            references.append(record.completion)
            continue
        last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        if last == 0:
            raise DataError(f"{rows.where(record.row)}: the assistant speaks first, so there is nothing to answer")
        assert template is not None, "conversations exist only where there is a chat template"
        try:
            prompts.append(_encodable(generation_prompt(record, last, tokenizer, template)))
        except DataError as error:
            raise DataError(f"{rows.where(record.row)}: {error.message}", help=error.help) from error
        references.append(record.messages[last]["content"])
    ids = encoder.ids(prompts)
    return [
        GenerationItem(
            np.array([*encoder.bos, *tokens] if isinstance(record, Plain) else tokens, dtype=np.int32),
            reference,
            record.row,
        )
        for record, tokens, reference in zip(records, ids, references, strict=True)
    ]


# --- inside ---


def _template(tokenizer: PreTrainedTokenizerBase, spec: DataSpec, format: Format, rows: Rows) -> ChatTemplate | None:
    """The chat template, where the format has a use for one."""
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} is slow: it does not say where in the text its tokens "
            "lie, which the loss mask needs",
            help="use a model that comes with a tokenizer.json",
        )
    if format == "text":
        return None
    template = load_template(tokenizer, spec.chat_template)
    if template is None and format in ("messages", "sharegpt"):
        raise DataError(
            f"{rows.origin[0]}: format `{format}` needs a chat template, and the tokenizer has none",
            help="name a Jinja file as `data.chat_template`, or give the data as prompt and completion",
        )
    return template


class _Encoder:
    """Records to token ids and labels, many at a time.

    Args:
        tokenizer: A fast one.
        template: For conversations.
        train_all: Every token is trained.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, *, train_all: bool) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._train_all = train_all
        # a model that expects a first token expects it before plain text as well; templates write it
        # themselves
        empty = tokenizer("", add_special_tokens=True)["input_ids"]
        bos = tokenizer.bos_token_id
        self.bos: list[int] = [bos] if bos is not None and empty[:1] == [bos] else []

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added."""
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return encoded

    def encode(self, records: Sequence[Record], rows: Rows) -> list[Example]:
        """Every record as an example, in order."""
        examples: list[Example] = []
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            plain = self._plain([record for record in chunk if isinstance(record, Plain)], rows)
            chats = self._conversations([record for record in chunk if isinstance(record, Conversation)], rows)
            plain_next, chat_next = iter(plain), iter(chats)
            examples += [next(plain_next if isinstance(record, Plain) else chat_next) for record in chunk]
        return examples

    def _plain(self, records: list[Plain], rows: Rows) -> list[Example]:
        """Prompt, completion and end-of-sequence token.

        Prompt and completion are tokenized apart, as the prompt stands alone when the model generates.
        """
        if not records:
            return []
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                f"{rows.origin[0]}: plain text ends with an end-of-sequence token, and the tokenizer has none"
            )
        examples = []
        prompts = self.ids([record.prompt for record in records])
        completions = self.ids([record.completion for record in records])
        for record, prompt, completion in zip(records, prompts, completions, strict=True):
            context = [*self.bos, *prompt]
            end = [] if completion[-1:] == [eos] else [eos]
            ids = np.array([*context, *completion, *end], dtype=np.int32)
            examples.append(self._example(ids, np.arange(len(ids)) >= len(context), record.row))
        return examples

    def _conversations(self, records: list[Conversation], rows: Rows) -> list[Example]:
        """The whole rendered text tokenized at once: the ids that the model meets when it is used."""
        if not records:
            return []
        if self._template is None:
            raise DataError(
                f"{rows.where(records[0].row)}: messages need a chat template, and the tokenizer has none",
                help="name a Jinja file as `data.chat_template`, or give the data as strings",
            )
        texts: list[str] = []
        spans: list[list[Span]] = []
        for record in records:
            try:
                text, trained = render(record, self._tokenizer, self._template)
                texts.append(_encodable(text))
            except DataError as error:
                raise DataError(f"{rows.where(record.row)}: {error.message}", help=error.help) from error
            spans.append(trained)
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return [
            self._example(np.array(ids, dtype=np.int32), _inside(offsets, trained), record.row)
            for record, ids, offsets, trained in zip(
                records, encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
            )
        ]

    def _example(self, ids: Ids, trained: NDArray[np.bool_], row: int) -> Example:
        labels = ids.copy() if self._train_all else np.where(trained, ids, np.int32(IGNORE))
        return Example(ids, labels, row)


def _encodable(text: str) -> str:
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


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example.row, len(example)], dtype="<i8").tobytes())
        digest.update(example.input_ids.astype("<i4").tobytes())
        digest.update(example.labels.astype("<i4").tobytes())
    return digest.hexdigest()


def _too_long(rows_and_lengths: list[tuple[int, int]], rows: Rows, spec: DataSpec) -> DataError:
    """The error of ``too_long: error``: the first few rows and the longest."""
    shown = "".join(f"\n  {rows.where(row)}: {length} tokens" for row, length in rows_and_lengths[:SHOWN])
    more = f"\n  and {len(rows_and_lengths) - SHOWN} more" if len(rows_and_lengths) > SHOWN else ""
    verb = "is" if len(rows_and_lengths) == 1 else "are"
    longest = max(length for _, length in rows_and_lengths)
    return DataError(
        f"{len(rows_and_lengths)} of {len(rows)} rows {verb} longer than data.max_length = {spec.max_length}"
        f"{shown}{more}",
        help=f"the longest has {longest} tokens: raise data.max_length, or set data.too_long: truncate",
    )


def _nothing_left(rows: Rows, spec: DataSpec, long: list[int], first_targets: list[int]) -> DataError:
    """The error when no example is left: all skipped, all masked after truncation, or nothing trained."""
    name = rows.origin[0]
    if spec.too_long == "skip" and len(long) == len(rows):
        return DataError(
            f"{name}: nothing to train on: all {len(rows)} rows are longer than "
            f"data.max_length = {spec.max_length} and skipped",
            help=f"the shortest has {min(long)} tokens, the longest {max(long)}: raise data.max_length",
        )
    if first_targets:
        return DataError(
            f"{name}: nothing to train on: in all {len(rows)} rows every trained token lies behind "
            f"data.max_length = {spec.max_length}",
            help=f"raise data.max_length: answers begin at tokens {min(first_targets) + 1} (the earliest) to "
            f"{max(first_targets) + 1} (the latest)",
        )
    return DataError(
        f"{name}: nothing to train on: no token of the {len(rows)} rows is a target",
        help="an example needs at least two tokens, and a chat template must mark what the assistant writes",
    )
