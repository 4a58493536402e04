"""What a user should know of the rows that became examples: what was cut, lost or left out, and of how many."""

from __future__ import annotations

from ftune.data.overlap import told
from ftune.data.splits import Splits, Stats
from ftune.data.unrendered import NOT_SHOWN

__all__ = ["notes_of", "notes_of_splits"]


def notes_of_splits(splits: Splits) -> list[str]:
    """Sentences about all rows: those trained on, those held out, both together, and their files; each once."""
    found = notes_of(splits.train.stats)
    if splits.eval is not None:
        found += [f"held-out data: {note}" for note in notes_of(splits.eval.stats)]
    found += told(splits.overlap)
    sources = [splits.train, *([splits.eval] if splits.eval is not None else [])]
    return list(dict.fromkeys([*found, *(note for split in sources for note in split.rows.notes)]))


def notes_of(stats: Stats) -> list[str]:
    """Sentences about one split, the gravest first; none where all of the data is used."""
    found: list[str] = []
    if stats.truncated:
        found.append(f"{_of(stats.truncated, stats.rows)} examples are cut at data.max_length{_lost(stats)}")
    if stats.cut_answers:
        found.append(
            f"{_of(stats.cut_answers, stats.rows)} examples lose the end of their answer, and with it the token that "
            "ends the turn"
        )
    if stats.skipped:
        found.append(f"{_of(stats.skipped, stats.rows)} rows are left out, longer than data.max_length{_lost(stats)}")
    if stats.no_target:
        behind = "" if stats.truncated or stats.skipped or not stats.lost_tokens else _lost(stats)
        found.append(f"{stats.no_target} examples are left out: nothing in them is trained on{behind}")
    if stats.ends_with_eos < 0.5 and stats.truncated < stats.examples:
        found.append(
            f"only {stats.ends_with_eos:.0%} of the examples end with the end-of-turn token: "
            "the model may not learn to stop"
        )
    if stats.control and stats.control_first is not None:
        row, token = stats.control_first
        found.append(
            f"{_of(stats.control, stats.rows)} rows have control tokens of the tokenizer in their text (first: "
            f"row {row}, `{token}`): the model reads them as such; take them out, unless they are meant"
        )
    found += [
        f"{_of(rows, stats.rows)} rows: {note}" for note, rows in stats.notes.items() if not note.startswith(NOT_SHOWN)
    ]
    hidden = [
        f"{note.removeprefix(NOT_SHOWN)} ({_of(rows, stats.rows)} rows)"
        for note, rows in stats.notes.items()
        if note.startswith(NOT_SHOWN)
    ]
    if hidden:
        found.append(f"{NOT_SHOWN}{', '.join(hidden)}")
    return found


def _of(count: int, rows: int) -> str:
    return f"all {rows:,}" if count == rows > 1 else f"{count:,} of {rows:,} ({count / rows:.0%})"


def _lost(stats: Stats) -> str:
    """How much of the text, and of what would be learned, is gone."""
    tokens = stats.lost_tokens / (stats.tokens + stats.lost_tokens)
    lost = f": {stats.lost_tokens:,} tokens ({tokens:.0%}) are lost"
    if not stats.lost_target_tokens:
        return lost
    targets = stats.lost_target_tokens / (stats.target_tokens + stats.lost_target_tokens)
    return f"{lost}, {stats.lost_target_tokens:,} ({targets:.0%}) of those in the loss"
