"""How a report looks: carets, tabs, wide characters, long lines, colour."""

from __future__ import annotations

import re

import pytest

from ftune.errors import RecipeError
from ftune.methods import METHODS
from ftune.recipe import parse_recipe
from ftune.recipe.other_tools import ELSEWHERE
from ftune.recipe.places import Mistake, Source, Span
from ftune.recipe.rendering import printable, render
from ftune.recipe.schema import Recipe
from ftune.recipe.spelling import closest
from ftune.recipe.suggestions import model_at


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


def method_report(method: str, field: str) -> str:
    text = f"model: org/tiny\nmethod: {{name: {method}, {field}}}\ndata: x.jsonl\noutput_dir: runs/x\n"
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    return caught.value.render()


@pytest.mark.parametrize(
    ("method", "word", "field"),
    [
        ("adalora", "tinit", "init_warmup"),
        ("adalora", "tfinal", "final_warmup"),
        ("adalora", "deltaT", "allocate_every"),
        ("adalora", "orth_reg_weight", "orthogonal_weight"),
        ("adalora", "target_r", "target_rank"),
        ("adalora", "init_r", "init_rank"),
        ("galore", "update_proj_gap", "update_every"),
        ("galore", "galore_rank", "rank"),
        ("longlora", "trainable_params", "train_embeddings"),
        ("vera", "projection_prng_key", "projection_seed"),
        ("fourierft", "random_loc_seed", "location_seed"),
        ("prompt", "num_virtual_tokens", "virtual_tokens"),
        ("prompt", "prompt_tuning_init_text", "init_text"),
        ("prefix", "prefix_projection", "projection"),
    ],
)
def test_the_name_that_peft_and_the_papers_code_use(method: str, word: str, field: str) -> None:
    assert f"did you mean `{field}`?" in method_report(method, f"{word}: 1")


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if not cls.quantizable])
@pytest.mark.parametrize("field", ["quantization: {}", "load_in_4bit: true", "bnb_4bit_quant_type: nf4"])
def test_a_method_that_cannot_be_quantized_says_so_and_which_can(method: str, field: str) -> None:
    report = method_report(method, field)
    assert f"`{method}` needs unquantized base weights" in report
    assert "did you mean" not in report
    assert all((f"`{name}`" in report) is cls.quantizable for name, cls in METHODS.items() if name != method)


def test_a_field_of_another_method_outranks_a_word_like_it() -> None:
    assert "a field of `adalora`" in method_report("vera", "init_rank: 8")
    assert "a field of `prefix` or `prompt`" in method_report("lora", "init_text: x")
    assert "did you mean `init`?" in method_report("lora", "int: pissa")


@pytest.mark.parametrize("value", ["nf4", "true", "NF4", "4bit"])
def test_quantization_as_a_switch_is_shown_as_a_block(value: str) -> None:
    assert "write {type: nf4}" in method_report("lora", f"quantization: {value}")
    assert "remove it" in method_report("lora", "quantization: false")


def test_no_name_of_another_tool_is_a_field_of_the_recipe() -> None:
    assert not ELSEWHERE.keys() & Recipe.model_fields.keys()


def test_sequences_of_the_schema_are_tuples() -> None:
    """Recipes are validated strictly with tuples: a list field could never be given."""

    def annotations(model: type) -> list[str]:
        return [str(info.annotation) for info in model.model_fields.values()]  # type: ignore[attr-defined]

    models = [Recipe, *METHODS.values()]
    models += [m for name in Recipe.model_fields if (m := model_at((name,), {})) is not None]
    assert not [text for model in models for text in annotations(model) if re.search(r"\blist\[|\bList\[", text)]
