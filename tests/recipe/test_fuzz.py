"""Bad recipes and overrides: each loads, or is refused with a located message; none ends in a traceback.

A few hundred cases run with the fast tests; ``pytest tests/recipe/test_fuzz.py --hypothesis-profile=fuzz`` runs
10,000 and more.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftune.errors import RecipeError
from ftune.recipe import load_checked
from recipe.mutations import RECIPES, changed_bytes, changed_texts, changed_trees, options, schema_recipes

SHIPPED = st.sampled_from(sorted(path.read_text(encoding="utf-8") for path in RECIPES.glob("*.yaml")))
LOCATED = ("error: ", "warning: ")
CPU_SECONDS = 5.0  # a recipe of this size takes milliseconds; a report of many mistakes on long lines a little more


@pytest.fixture(autouse=True, scope="module")
def _somewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with contextlib.chdir(tmp_path_factory.mktemp("fuzz")):
        Path("data.jsonl").write_text('{"text": "a"}\n')
        os.mkfifo("fifo.jsonl")
        Path("recipes").symlink_to(RECIPES)
        yield


def loads_or_refuses(recipe: str | bytes, *overrides: str) -> bool:
    """Load a recipe file; returns whether it was valid, and holds that a refusal says where and what."""
    data = recipe.encode("utf-8", errors="surrogatepass") if isinstance(recipe, str) else recipe
    Path("r.yaml").write_bytes(data)
    began = time.process_time()
    try:
        _, reports = load_checked(Path("r.yaml"), overrides)
        valid = True
    except RecipeError as error:
        reports, valid = error.reports, False
        assert reports
    assert time.process_time() - began < CPU_SECONDS
    for report in reports[:50]:
        assert report.startswith(LOCATED), report
        assert "\n  --> r.yaml" in report or "\n  --> command line" in report, report
        assert not any(character in report for character in "\x00\x07\x1b\u202e"), report
        report.encode("utf-8")
    return valid


@given(schema_recipes())
def test_recipes_of_the_schema(text: str) -> None:
    loads_or_refuses(text)


@given(changed_trees())
def test_shipped_recipes_with_other_values(text: str) -> None:
    loads_or_refuses(text)


@given(changed_texts())
def test_shipped_recipes_with_other_text(text: str) -> None:
    loads_or_refuses(text)


@given(changed_bytes())
def test_shipped_recipes_with_other_bytes(data: bytes) -> None:
    loads_or_refuses(data)


@given(SHIPPED, st.lists(options(), min_size=1, max_size=3))
def test_overrides(text: str, overrides: list[str]) -> None:
    loads_or_refuses(text, *overrides)
