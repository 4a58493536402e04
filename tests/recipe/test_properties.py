"""Properties: YAML 1.2 numbers, and no text that does anything but load or be refused."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ftune.errors import RecipeError
from ftune.recipe import check, parse_recipe
from ftune.recipe.diagnose import from_problems
from ftune.recipe.load import is_plain_string
from ftune.recipe.rendering import render
from recipe import mutations

SHORT = "model: org/tiny\nmethod: lora\ndata: data/train.jsonl\noutput_dir: runs/x\n"

GOOD = """# yaml-language-server: $schema=recipe.schema.json
version: 1
model: {id: org/tiny, revision: main, dtype: bfloat16}
method:
  name: lora
  rank: 8
  target_modules: [q_proj, v_proj]
data:
  train: {path: data/train.jsonl, format: auto}
  eval_fraction: 0.1
optimizer: {learning_rate: 2e-4, betas: [0.9, 0.95]}
training: &training
  max_steps: 10
  gradient_checkpointing: true
evaluation:
  every_steps: 5
  metrics:
    - exact_match
    - {name: regex, pattern: "a (.*)"}
tracking: [progress, jsonl]
output_dir: "runs/x"
"""

PIECES = [*mutations.PIECES, "<<: *training"]
KEYS = [
    "training",
    "training.max_steps",
    "method.rank",
    "method",
    "data.eval.path",
    "tracking.0",
    "evaluation.metrics.1.name",
    "model.id",
    "x",
    "",
]

quick = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(st.floats(min_value=1e-12, max_value=10, exclude_min=True))
def test_any_float_python_writes_is_read(number: float) -> None:
    assert parse_recipe(f"{SHORT}optimizer: {{learning_rate: {number!r}}}\n", "r").recipe.learning_rate == number


@quick
@given(st.integers(0, 2**31 - 1), st.sampled_from(["{}", "+{}", "0{}", "0x{:x}", "0o{:o}"]))
def test_any_integer_is_read(number: int, form: str) -> None:
    text = f"{SHORT}training: {{seed: {form.format(number)}}}\n"
    assert parse_recipe(text, "r").recipe.training.seed == number


@quick
@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-10, max_value=10),
    st.integers(-5, 5),
)
def test_mantissa_and_exponent(mantissa: object, exponent: int) -> None:
    text = f"{mantissa}e{exponent}"
    with contextlib.suppress(RecipeError):
        rate = parse_recipe(f"{SHORT}optimizer: {{learning_rate: {text}}}\n", "r").recipe.optimizer.learning_rate
        assert rate == float(text)
        assert math.isfinite(rate)
        return
    assert not 0 < float(text) <= 10


@quick
@given(st.text(st.characters(codec="utf-8"), max_size=20))
@example("no")
@example("1_0")
@example("a: b")
def test_a_plain_string_is_read_back_as_itself(text: str) -> None:
    if is_plain_string(text):
        assert parse_recipe(SHORT.replace("runs/x", text), "r").recipe.output_dir == text


def loads_or_refuses(text: str, *overrides: str) -> None:
    reports: list[str] = []
    try:
        loaded = parse_recipe(text, "r.yaml", overrides)
        mistakes = from_problems(check(loaded.recipe), loaded.positions)
        reports = [render(mistake, loaded.positions.source, width=80) for mistake in mistakes]
    except RecipeError as error:
        reports = error.reports or ["a refusal without a reason"]
    assert all(report.startswith("error: ") and "\n  --> " in report for report in reports[:50])


@quick
@given(st.data())
def test_a_mutated_recipe_loads_or_is_refused(data: st.DataObject) -> None:
    text = GOOD
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 12)))
        text = text[:start] + data.draw(st.sampled_from(["", *PIECES])) + text[end:]
    loads_or_refuses(text)


@quick
@given(st.lists(st.sampled_from([*PIECES, *GOOD.split()]), max_size=30).map("".join))
def test_any_text_loads_or_is_refused(text: str) -> None:
    loads_or_refuses(text)
    loads_or_refuses(SHORT + text)


@quick
@example([("training", "#")])
@given(
    st.lists(
        st.tuples(st.sampled_from(KEYS), st.lists(st.sampled_from(PIECES + ["lora", "a"]), max_size=5).map("".join)),
        max_size=3,
    )
)
def test_any_override_is_applied_or_refused(options: list[tuple[str, str]]) -> None:
    loads_or_refuses(GOOD, *(f"{key}={value}" for key, value in options))


@quick
@given(st.text(max_size=30))
def test_any_option_is_applied_or_refused(option: str) -> None:
    loads_or_refuses(GOOD, option)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "path", "id", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@quick
@given(st.data())
def test_any_value_anywhere_loads_or_is_refused(data: st.DataObject) -> None:
    import json

    path = data.draw(
        st.sampled_from(
            [
                "version",
                "model",
                "model.id",
                "method",
                "method.name",
                "method.target_modules",
                "data",
                "data.train",
                "data.eval",
                "data.packing",
                "optimizer",
                "optimizer.betas",
                "training",
                "training.seed",
                "evaluation.metrics",
                "evaluation.metrics.0",
                "tracking",
                "output_dir",
            ]
        )
    )
    value = json.dumps(data.draw(JSON))
    loads_or_refuses(GOOD, f"{path}={value}")


@pytest.fixture(autouse=True, scope="module")
def _somewhere_empty(tmp_path_factory: pytest.TempPathFactory) -> object:
    with contextlib.chdir(tmp_path_factory.mktemp("empty")):
        yield
