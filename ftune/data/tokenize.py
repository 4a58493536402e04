"""Rows as token ids and labels, with the counts that a run is judged by.

``labels[i]`` is the token at ``i`` where it is trained, else -100; the shift by one happens in the loss, and
an example's first token is never a target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from ftune.data import token_cache
from ftune.data.answers import Answer, calls_of, read_answer, same_value, written_answer
from ftune.data.chat import ChatTemplate, generation_prompt, load_template, special_tokens
from ftune.data.encode import Encoder, encodable
from ftune.data.encoded import Part, RowError
from ftune.data.examples import IGNORE, Example, Examples
from ftune.data.formats import SHOWN, Format, Plain, convert
from ftune.data.read import read_source
from ftune.data.sources import Rows
from ftune.data.splits import GenerationItem, Split, Splits, Stats
from ftune.data.workers import encode_all
from ftune.errors import DataError
from ftune.recipe.data_files import locate_data
from ftune.recipe.schema import DataSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE",
    "Example",
    "encoder_for",
    "generation_items",
    "load_splits",
    "template_for",
    "tokenize_split",
    "too_long_of",
]


def load_splits(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, seed: int) -> Splits:
    """Read and tokenize the training rows and those held out.

    With ``eval_fraction`` and no eval source, rows are drawn by seed and held out whole.

    Raises:
        DataError: Anything in the data that cannot be trained on.
    """
    held_out_files = () if spec.eval is None else locate_data(spec.eval, "eval").files
    train, format = read_source(spec.train, without=held_out_files)
    held_out: Rows | None = None
    held_out_format = format
    if spec.eval is not None:
        held_out, held_out_format = read_source(spec.eval, "eval", like=spec.train)
    elif spec.eval_fraction > 0:
        train, held_out = _hold_out(train, spec.eval_fraction, seed)
    return Splits(
        train=tokenize_split(train, tokenizer, spec, format),
        eval=tokenize_split(held_out, tokenizer, spec, held_out_format) if held_out is not None else None,
    )


def _hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Two disjoint parts of the rows: what is left to train on, and at least one row held out."""
    if len(rows) < 2:
        raise DataError(
            f"{rows.origin[0]}: one row cannot be split by `eval_fraction`",
            help="set `eval_fraction: 0`, or name held-out rows as `data.eval`; `split_on` cuts a .txt file into rows",
        )
    count = min(max(1, round(len(rows) * fraction)), len(rows) - 1)
    # RandomState's stream is frozen across NumPy versions, the Generator's is not
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, len(rows)))))
    drawn = random.permutation(len(rows))
    numbers = [int(n) for n in np.asarray(rows.numbers)[drawn]]
    return rows.select(numbers[count:]), rows.select(numbers[:count])


def tokenize_split(rows: Rows, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, format: Format) -> Split:
    """Turn every row into an example, or say why it cannot be one.

    What was tokenized before, to the last byte of all that decides it, comes from the cache.

    Raises:
        DataError: A slow tokenizer, rows that do not fit, rows too long under ``too_long: error``, or nothing
            left to train on.
    """
    template = template_for(tokenizer, spec, format, rows)
    settings = spec.model_dump(mode="json", include={"max_length", "train_on"})
    settings |= {"format": format, "too_long": too_long_of(spec, format)}
    key = token_cache.key_of(rows, tokenizer, template, settings)
    known = token_cache.load(key)
    if known is None:
        examples, stats = _tokenized(rows, tokenizer, spec, format, template)
        known = token_cache.Entry(examples, asdict(stats), examples.fingerprint())
        token_cache.store(key, known)
    return Split(known.examples, format, Stats(**known.stats), known.fingerprint, rows)


def _tokenized(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, format: Format, template: ChatTemplate | None
) -> tuple[Examples, Stats]:
    """The examples and their counts."""
    records = convert(rows, format, chat_template=template is not None)
    encoder = encoder_for(tokenizer, template, spec, format)
    try:
        parts = list(encode_all(encoder, records))
    except RowError as error:
        raise _placed(error, rows) from error
    too_long = [place for part in parts for place in part.too_long]
    if too_long and spec.too_long == "error":
        raise _too_long(too_long, rows, spec)
    examples = Examples.joined([part.examples for part in parts])
    if not len(examples):
        first_targets = [place for part in parts for place in part.first_targets]
        raise _nothing_left(rows, spec, [length for _, length in too_long], first_targets, _notes(parts))
    return examples, _stats(rows, spec, examples, parts)


def _stats(rows: Rows, spec: DataSpec, examples: Examples, parts: Sequence[Part]) -> Stats:
    truncated = sum(part.truncated for part in parts)
    control = [found for part in parts for found in part.control]
    untruncated = len(np.unique(examples.rows)) - truncated
    # an example's first token is no target
    first = examples.trained[np.cumsum(examples.lengths) - examples.lengths]
    return Stats(
        rows=len(rows),
        examples=len(examples),
        tokens=len(examples.ids),
        target_tokens=int(np.count_nonzero(examples.trained) - np.count_nonzero(first)),
        truncated=truncated,
        skipped=sum(len(part.too_long) for part in parts) if spec.too_long in ("skip", "error") else 0,
        no_target=sum(part.no_target for part in parts),
        ends_with_eos=sum(part.ended for part in parts) / untruncated if untruncated else 0.0,
        longest=int(examples.lengths.max()),
        longest_before=max(part.longest_before for part in parts),
        cut_answers=sum(part.cut_answers for part in parts),
        split=sum(part.split for part in parts),
        lost_tokens=sum(part.lost_tokens for part in parts),
        lost_target_tokens=sum(part.lost_target_tokens for part in parts),
        notes=_notes(parts),
        control=len(control),
        control_first=(control[0][0] + 1, control[0][1]) if control else None,
    )


def _notes(parts: Sequence[Part]) -> dict[str, int]:
    """What to tell of rows, with the number of rows."""
    notes: Counter[str] = Counter()
    for part in parts:
        notes.update(part.notes)
    return dict(sorted(notes.items()))


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
    template = template_for(tokenizer, spec, format, rows)
    encoder = encoder_for(tokenizer, template, spec.model_copy(update={"too_long": "truncate"}), format)
    prompts: list[str] = []
    references: list[Answer] = []
    specials = tuple(special_tokens(tokenizer))
    records = convert(rows, format, chat_template=template is not None)
    for record in records:
        if isinstance(record, Plain):
            prompts.append(record.prompt)
            references.append(read_answer(record.completion, specials))
            continue
        last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
        if last == 0:
            raise DataError(
                f"{rows.where(record.row)}: the assistant speaks first, so there is nothing to answer",
                help="put the turn that it answers before it (role `user`), or leave out the row",
            )
        assert template is not None, "conversations exist only where there is a chat template"
        try:
            conversation = encoder.prepared(record)
            prompts.append(encodable(generation_prompt(conversation, last, tokenizer, template)))
        except DataError as error:
            raise DataError(f"{rows.where(record.row)}: {error.message}", help=error.help) from error
        written = written_answer(conversation, last, prompts[-1], tokenizer, template)
        reference, calls = read_answer(written, specials), calls_of(record.messages[last])
        # Calls are compared only where what the template writes is understood: the answer is read in the same way.
        known = same_value(reference.calls, calls)
        references.append(reference if known else replace(reference, calls=()))
    ids = encoder.prompt_ids(prompts, [isinstance(record, Plain) for record in records])
    return [
        GenerationItem(np.array(tokens, dtype=np.int32), reference, record.row)
        for record, tokens, reference in zip(records, ids, references, strict=True)
    ]


def too_long_of(spec: DataSpec, format: Format) -> Literal["truncate", "skip", "error", "split"]:
    """What happens to rows longer than ``max_length``; ``auto`` is decided by the format.

    Raises:
        DataError: ``split`` for rows that have an answer, whose prompt the later parts would lack.
    """
    if spec.too_long == "auto":
        return "split" if format == "text" else "truncate"
    if spec.too_long == "split" and format != "text":
        raise DataError(
            f"data.too_long: split is for the format `text`; these rows are `{format}`, and a part of an answer "
            "without its prompt teaches something else",
            help="raise data.max_length, or set data.too_long to truncate, skip or error",
        )
    return spec.too_long


# --- inside ---


def template_for(tokenizer: PreTrainedTokenizerBase, spec: DataSpec, format: Format, rows: Rows) -> ChatTemplate | None:
    """The chat template, where the format has a use for one.

    Raises:
        DataError: A slow tokenizer, or no template where the format needs one.
    """
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


def encoder_for(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, spec: DataSpec, format: Format
) -> Encoder:
    """What turns records into token ids as the recipe asks."""
    return Encoder(
        tokenizer,
        template,
        train_on=spec.train_on,
        max_length=spec.max_length,
        too_long=too_long_of(spec, format),
    )


def _placed(error: RowError, rows: Rows) -> DataError:
    """The error with the place of its row."""
    place = rows.origin[0] if error.row is None else rows.where(error.row)
    return DataError(f"{place}: {error.message}", help=error.help)


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


def _nothing_left(
    rows: Rows, spec: DataSpec, long: list[int], first_targets: list[int], notes: Mapping[str, int]
) -> DataError:
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
    reasons = "".join(f"\n  {count} of {len(rows)} rows: {note}" for note, count in notes.items())
    return DataError(
        f"{name}: nothing to train on: no token of the {len(rows)} rows is a target{reasons}",
        help="an example needs at least two tokens, and a chat template must mark what the assistant writes",
    )
