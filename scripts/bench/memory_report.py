"""The page's part on predicted memory, as a pure function of what ``scripts/measure_memory.py --out`` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from table import table

MIB = 2**20

HEAD = """
## The plan's memory against what was used

`python scripts/measure_memory.py`: SmolLM2-135M-Instruct, two updates of rows of exactly so many tokens. The peak is
the largest resident size of the process from its first update on, in MiB; kept: no activation is recomputed,
recomputed: every block's. The same in bf16, and at 2,048 tokens, is in docs/design/log.md.
"""

NOTE = """
{dtype}, {device}: {within} of {count} within 10 %, predicted / measured {low:.2f} to {high:.2f}, median {middle:.2f}.

"""


def section(figures: Sequence[dict[str, Any]]) -> str:
    """One table for each dtype; nothing where nothing was measured.

    Args:
        figures: What was measured, each in one dtype on one device.
    """
    if not figures:
        return ""
    return HEAD + "".join(_note(found) + _table(found["cases"]) for found in figures)


def _note(found: dict[str, Any]) -> str:
    ratios = [case["ratio"] for case in found["cases"]]
    return NOTE.format(
        dtype=found["cases"][0]["dtype"],
        device=found["device"],
        within=sum(abs(ratio - 1) <= 0.1 for ratio in ratios),
        count=len(ratios),
        low=min(ratios),
        high=max(ratios),
        middle=median(ratios),
    )


def _table(cases: Sequence[dict[str, Any]]) -> str:
    found = {(case["method"], case["length"], case["checkpointing"]): case for case in cases}
    rows = []
    for method, length in dict.fromkeys((case["method"], case["length"]) for case in cases):
        row = [method, f"{length:,}"]
        for checkpointing in ("off", "on"):
            case = found.get((method, length, checkpointing))
            row += ["-"] * 3 if case is None else _cells(case)
        rows.append(row)
    kept, again = ([f"{how}: predicted", "measured", "predicted / measured"] for how in ("kept", "recomputed"))
    return table(["method", "tokens a row", *kept, *again], rows)


def _cells(case: dict[str, Any]) -> list[str]:
    measured = case["measured"] / MIB
    return [f"{measured * case['ratio']:,.0f}", f"{measured:,.0f}", f"{case['ratio']:.2f}"]
