"""How a report looks: carets, tabs, wide characters, long lines, colour."""

from __future__ import annotations

import re

import pytest

from ftune.methods import METHODS
from ftune.recipe.diagnose import ELSEWHERE, Mistake, Source, Span, closest, model_at, printable, render
from ftune.recipe.schema import Recipe


def report(line: str, column: int, length: int = 1, *, width: int = 80, label: str = "here") -> list[str]:
    source = Source("r.yaml", line)
    return render(Mistake("wrong", Span(source, 0, column, length), label), source, width=width).splitlines()


def test_the_shape() -> None:
    assert report("  rnak: 16", 2, 4, label="did you mean `rank`?") == [
        "error: wrong",
        "  --> r.yaml:1:3",
        "1 |   rnak: 16",
        "  |   ^^^^ did you mean `rank`?",
    ]


def test_tabs_are_shown_as_spaces_and_the_caret_follows() -> None:
    assert report("a:\tb: 1", 3)[2:] == ["1 | a:  b: 1", "  |     ^ here"]
    assert report("\t\tb", 2)[2:] == ["1 |         b", "  |         ^ here"]


def test_wide_and_combining_characters_take_their_columns() -> None:
    assert report("名前: x", 4)[2:] == ["1 | 名前: x", "  |       ^ here"]
    assert report("名前: x", 0, 2)[3] == "  | ^^^^ here"
    assert report("e\u0301: x", 4)[3] == "  |    ^ here"


@pytest.mark.parametrize("column", [0, 40, 199, 399])
def test_a_long_line_is_trimmed_around_the_caret(column: int) -> None:
    line = "".join(chr(ord("a") + i % 26) for i in range(400))
    shown, caret = (text.split("| ", 1)[1] for text in report(line, column, width=60)[2:])
    assert len(shown) <= 56
    assert shown[caret.index("^")] == line[column]
    assert shown.startswith("\u2026") is (column > 0)
    assert shown.endswith("\u2026") is (column < 399)


def test_a_label_that_does_not_fit_becomes_help() -> None:
    lines = report("x" * 70, 60, width=70, label="a long explanation that would not fit behind the caret")
    assert lines[-2].endswith("^")
    assert lines[-1].startswith("  help: a long explanation")


def test_control_characters_never_reach_the_terminal() -> None:
    text = render(Mistake("bad \x1b[31m", None, help="\x07"), Source("r\x1b.yaml", ""), width=80)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert len(printable("x" * 10**6)) < 1000


def test_colour_only_when_asked_and_without_changing_the_text() -> None:
    source = Source("r.yaml", "rnak: 16")
    mistake = Mistake("wrong", Span(source, 0, 0, 4), "here", "mend it", also=(Span(source, 0, 6, 2), "and here"))
    plain, coloured = (render(mistake, source, width=80, color=color) for color in (False, True))
    assert "\x1b" not in plain
    assert coloured != plain
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_closest_ignores_case_and_gives_up_on_long_words() -> None:
    assert closest("SDPA", ["sdpa", "eager"]) == "sdpa"
    assert closest("zzz", ["sdpa"]) is None
    assert closest("sdpa" * 100, ["sdpa" * 99]) is None


@pytest.mark.parametrize("path", sorted(set(ELSEWHERE.values())))
def test_every_name_of_another_tool_leads_to_a_field_of_some_method(path: str) -> None:
    *parent, name = path.split(".")
    models = [model_at(tuple(parent), {"method": {"name": method}}) for method in METHODS]
    assert any(model is not None and name in model.model_fields for model in models)


def test_no_name_of_another_tool_is_a_field_of_the_recipe() -> None:
    assert not ELSEWHERE.keys() & Recipe.model_fields.keys()


def test_sequences_of_the_schema_are_tuples() -> None:
    """Recipes are validated strictly with tuples: a list field could never be given."""

    def annotations(model: type) -> list[str]:
        return [str(info.annotation) for info in model.model_fields.values()]  # type: ignore[attr-defined]

    models = [Recipe, *METHODS.values()]
    models += [m for name in Recipe.model_fields if (m := model_at((name,), {})) is not None]
    assert not [text for model in models for text in annotations(model) if re.search(r"\blist\[|\bList\[", text)]
