"""The rows of a study: those to train on, those to choose by, and those that the report alone is made on.

Nothing is chosen on the test rows, so what is reported of them is not too good. Where a study names none they are
drawn once, written down, and kept out of training: a fifth of the training rows; validation rows likewise, a tenth,
where the recipe has no ``data.eval``. Equal rows go to one side. The draw depends on the rows alone, not on a seed of
training, so that every run of a study has the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftune.data.sources import Row, load_rows
from ftune.errors import DataError, RunDirError
from ftune.recipe.data_files import locate_data
from ftune.recipe.schema import DataSource, DataSpec
from ftune.run.files import write_json, write_text

__all__ = ["Drawn", "draw", "forget_measured"]

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
MOST_TEST, MOST_VALIDATION = 2_000, 500
FEWEST = 20
"""Rows from which on a test split can be drawn."""


@dataclass(frozen=True)
class Drawn:
    """Where the rows are.

    Attributes:
        data: Blocks to put into a recipe's ``data``: ``train``, ``eval``, ``eval_fraction``.
        test: The block of the test rows, for ``data.eval``.
        counts: Rows of ``train``, ``validation`` and ``test``; of the recipe's own validation rows, None.
        drawn: Which of them were drawn here.
    """

    data: dict[str, Any]
    test: dict[str, Any]
    counts: dict[str, int | None]
    drawn: tuple[str, ...]


def draw(data: DataSpec, test: str | None, out: Path, *, begun: bool = False) -> Drawn:
    """Divide the rows of a recipe, and write what is drawn below ``out``; or find it as it was written.

    Args:
        data: The recipe's.
        test: A source of test rows; None: draw them.
        out: The study's directory for data.
        begun: Whether the study has begun; before, other rows are drawn anew, and what was measured of the old goes.

    Raises:
        DataError: There are too few rows, or they cannot be read.
        RunDirError: The rows are not those that the study began with.
    """
    held_out = () if data.eval is None else locate_data(data.eval, "eval").files
    rows = load_rows(data.train, "train", without=held_out)
    fingerprint = (
        rows.fingerprint if data.eval is None else _joined(rows.fingerprint, load_rows(data.eval, "eval").fingerprint)
    )
    own = {"format": data.train.format} | ({"columns": data.train.columns.given()} if data.train.columns else {})
    wanted: dict[str, int] = {}
    if test is None:
        wanted["test"] = min(MOST_TEST, round(TEST_SHARE * len(rows)))
    if data.eval is None:
        share = data.eval_fraction or VALIDATION_SHARE
        wanted["validation"] = min(MOST_VALIDATION, max(1, round(share * len(rows))))
    if test is not None:
        tests = load_rows(DataSource(path=test), "eval")
        fingerprint = _joined(fingerprint, tests.fingerprint)
    if "test" in wanted and len(rows) < FEWEST:
        raise DataError(
            f"{rows.origin[0]} has {len(rows)} rows: too few to draw test rows from, which nothing is chosen on",
            help="give more rows, or name test rows of their own with `test: FILE`",
        )
    manifest = out / "split.json"
    files = {name: out / f"{name}.jsonl" for name in ("train", *wanted)} if wanted else {}
    counts: dict[str, int | None]
    kept = json.loads(manifest.read_text()) if manifest.is_file() else {}
    if kept.get("fingerprint") == fingerprint and set(kept["files"]) == {path.name for path in files.values()}:
        counts = kept["counts"]
    elif begun:
        raise RunDirError(
            f"the data is not what the study in {out.parent} began with",
            help="restore the files, or begin another study with another output_dir",
        )
    else:
        parts = _divided([row for _, row in rows], wanted)
        counts = {"train": len(rows), "validation": None, "test": None if test is None else len(tests)} | {
            name: len(part) for name, part in parts.items()
        }
        forget_measured(out.parent)  # of other rows
        out.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            write_text(path, "".join(f"{_line(row)}\n" for row in parts[name]))
        write_json(
            manifest, {"fingerprint": fingerprint, "counts": counts, "files": [path.name for path in files.values()]}
        )
    blocks: dict[str, Any] = {"eval_fraction": 0.0}
    if "train" in files:
        blocks["train"] = {"path": str(files["train"]), **own}
    if "validation" in files:
        blocks["eval"] = {"path": str(files["validation"]), **own}
    tested = {"path": str(files["test"]), **own} if "test" in files else {"path": str(test)}
    return Drawn(blocks, tested, counts, tuple(wanted))


def forget_measured(root: Path) -> None:
    """Delete what was measured in a study's directory before it began."""
    for name in ("speed", "tests"):
        shutil.rmtree(root / name, ignore_errors=True)


def _divided(rows: Sequence[Row], wanted: dict[str, int]) -> dict[str, list[Row]]:
    """Rows dealt out by chance, equal ones together; ``train`` gets what is left, each part in its first order."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_line(row), []).append(index)
    keys = list(groups)
    # RandomState's stream is frozen across NumPy versions, the Generator's is not.
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((18, len(rows)))))
    order = [groups[keys[int(i)]] for i in random.permutation(len(keys))]
    parts: dict[str, list[int]] = {name: [] for name in (*wanted, "train")}
    for group in order:
        name = next((name for name, count in wanted.items() if len(parts[name]) + len(group) <= count), "train")
        parts[name] += group
    return {name: [rows[i] for i in sorted(part)] for name, part in parts.items()}


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)


def _joined(*fingerprints: str) -> str:
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()
