"""The test rows of a page: those that tell most come first, and a page stays small."""

from __future__ import annotations

from typing import Any

from ftune.experiments.items import MOST_BYTES, MOST_ITEMS, items_part


def item(row: int, *scores: float, answer: str = "x") -> dict[str, Any]:
    answers = {name: (answer, score) for name, score in zip(("lora", "b", "c"), scores, strict=True)}
    return {"row": row, "prompt": f"p{row}", "reference": "r", "answers": answers}


def test_the_rows_on_which_models_differ_most_come_first() -> None:
    items = [item(0, 0.5, 0.5, 0.5), item(1, 0.0, 1.0, 0.0), item(2, 0.5, 0.5, 0.2)]
    find, *shown = items_part(items, "lora", "LoRA", ["b", "c"])
    assert [text[text.index("row ") :][:5] for text in shown] == ["row 1", "row 2", "row 0"]
    assert "<option>b won</option><option>b lost</option>" in find
    assert "b won" in shown[0]
    assert "c lost" in shown[1]
    assert "won" not in shown[2]


def test_what_is_left_out_is_told() -> None:
    items = [item(row, 0.0, 0.0, 0.0) for row in range(MOST_ITEMS + 1)]
    note, _, *shown = items_part(items, "lora", "LoRA", ["b", "c"])
    assert len(shown) == MOST_ITEMS
    assert f"{MOST_ITEMS} of {MOST_ITEMS + 1} rows" in note


def test_long_answers_in_any_script_do_not_make_a_page_too_large() -> None:
    items = [item(row, 0.0, 0.0, 0.0, answer="\u65e5" * 1_000) for row in range(MOST_ITEMS)]
    note, _, *shown = items_part(items, "lora", "LoRA", ["b", "c"])
    assert MOST_BYTES * 0.9 < len("".join(shown).encode()) <= MOST_BYTES
    assert f"{len(shown)} of {MOST_ITEMS} rows" in note


def test_markup_in_answers_is_shown_and_not_obeyed() -> None:
    _, shown = items_part([item(0, 0.0, 0.0, 0.0, answer="<script>x</script> [a](b)")], "lora", "LoRA", [])
    assert "<script>" not in shown
    assert "<a " not in shown
