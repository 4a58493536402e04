"""Golden tests: every kind of bad data beside the message that it gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.kit import build_tokenizer
from ftune.data.tokenize import load_splits
from ftune.errors import DataError
from ftune.recipe.schema import DataSource, DataSpec

BAD = Path(__file__).parent / "bad"

# data, settings of the data block, and the tokenizer's template; where they are not those of every other case
CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "kinds": ("kinds", {}, "chatml"),
    "all_masked": ("all_masked.jsonl", {"max_length": 32}, "chatml"),
    "all_skipped": ("all_skipped.jsonl", {"max_length": 8, "too_long": "skip"}, "chatml"),
    "too_long": ("too_long.jsonl", {"max_length": 32, "too_long": "error"}, "chatml"),
    "format_asked": ("too_long.jsonl", {"train": {"format": "alpaca"}}, "chatml"),
    "template_none": ("no_assistant.jsonl", {"train": {"max_examples": 1}}, None),
    "template_missing": ("template_refuses.jsonl", {"chat_template": "no_such.jinja"}, "chatml"),
    "template_syntax": ("template_refuses.jsonl", {"chat_template": "template_syntax.jinja"}, "chatml"),
    "template_macro": ("template_refuses.jsonl", {"chat_template": "template_macro.jinja"}, "chatml"),
    "template_refuses": ("template_refuses.jsonl", {}, "alternates"),
}
FILES = sorted(path for path in BAD.iterdir() if path.suffix in (".jsonl", ".json", ".csv", ".parquet"))
CASES |= {path.stem: (path.name, {}, "chatml") for path in FILES if path.stem not in CASES}


@pytest.mark.parametrize("name", sorted(CASES))
def test_bad_data(name: str, golden: Callable[[Path, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BAD)
    data, settings, template = CASES[name]
    settings = dict(settings)
    spec = DataSpec(train=DataSource(path=data, **settings.pop("train", {})), **settings)
    with pytest.raises(DataError) as caught:
        load_splits(spec, build_tokenizer(template), seed=7)
    golden(BAD / f"{name}.txt", caught.value.render() + "\n")


def test_no_message_names_a_path_outside_the_data() -> None:
    for path in BAD.glob("*.txt"):
        assert str(Path.cwd()) not in path.read_text(), path.name
        assert path.stem in CASES, f"{path.name} belongs to no case"
