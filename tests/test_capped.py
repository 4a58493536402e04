"""Which older processors a processor can stand in for, and that the tests to run there exist."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CAPPED = runpy.run_path(str(ROOT / "scripts/capped/run.py"))
HASWELL = {"avx", "avx2", "fma"}
ZEN_4 = HASWELL | {"avx512f", "avx512_bf16"}


@pytest.mark.parametrize(
    ("has", "levels"),
    [
        (set(), []),  # arm64, or a system that lists none
        (HASWELL, []),
        (HASWELL | {"avx512f"}, ["avx2"]),
        (ZEN_4, ["avx2", "avx512"]),
        (ZEN_4 | {"amx_bf16", "amx_tile"}, ["avx2", "avx512", "avx512-bf16"]),
    ],
)
def test_a_processor_stands_in_for_every_older_one(has: set[str], levels: list[str]) -> None:
    assert CAPPED["possible"](has) == levels


@pytest.mark.parametrize("level", CAPPED["LEVELS"].values())
def test_the_tests_of_a_level_exist(level) -> None:
    assert all((ROOT / path).exists() for path in level.paths)
