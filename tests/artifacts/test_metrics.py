"""Task metrics on answers that are nearly right."""

from __future__ import annotations

import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftune.artifacts.classes import OTHER, measure_classes
from ftune.artifacts.metrics import (
    choice,
    contains,
    exact_match,
    f1,
    find_metric,
    json_equal,
    regex,
    rouge_l,
    strict,
)
from ftune.artifacts.scores import check_references, key_of, score
from ftune.data.answers import Answer
from ftune.errors import DataError, FtuneError, RecipeError
from ftune.recipe import load_checked
from ftune.recipe.schema import MetricSpec


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "expected"),
    [
        (exact_match, "The Eiffel Tower.", "eiffel tower", 1),
        (exact_match, "eiffel tower in Paris", "eiffel tower", 0),
        (exact_match, "5", "-5", 0),
        (exact_match, "314", "3.14", 0),
        (exact_match, "x-1", "x+1", 0),
        (exact_match, "C", "C++", 0),
        (exact_match, "", "A", 0),
        (exact_match, "the", "A", 0),
        (exact_match, "北京。", "北京", 1),
        (exact_match, "", "", 1),
        (exact_match, "...", "!!!", 0),
        (exact_match, "first\nsecond", "first second", 1),
        (contains, "It is the Eiffel Tower in Paris.", "Eiffel tower", 1),
        (contains, "category", "cat", 0),
        (contains, "", "cat", 0),
        (contains, "cat", "", 0),
        (contains, "", "", 1),
        (contains, "The answer is A", "A", 1),
        (contains, "A. Paris", "A", 1),
        (contains, "A cat sat", "A", 0),
        (contains, "首都是北京。", "北京", 1),
        (contains, "เมืองหลวงคือกรุงเทพ", "กรุงเทพ", 1),
        (contains, "It is 3.5 kg", "35", 0),
        (contains, "It is 3.5 kg", "5", 0),
        (contains, "I use C++ daily", "C", 0),
        (contains, "It was -5 degrees", "5", 0),
        (contains, "done 👍", "👍", 1),
        (contains, "really?!", "?!", 1),
        (contains, "？！", "？", 1),
        (contains, "wait！", "!", 1),
        (contains, "wait", "！", 0),
        (strict, "Paris\n", "Paris", 1),
        (strict, "paris", "Paris", 0),
        (f1, "the cat sat", "cat", 2 / 3),
        (f1, "cat cat", "cat", 2 / 3),
        (f1, "北京市", "北京", 0.8),
        (f1, "", "", 1),
        (f1, "", "cat", 0),
        # as rouge-score 0.1.2 has it, without articles; 300 random pairs agree to the last digit
        (rouge_l, "dog sat on big red mat", "dog ran on mat", 0.6),
        (rouge_l, "sky blue sky", "blue sky blue sky", 6 / 7),
        (rouge_l, "cat", "dog", 0),
        (rouge_l, "東京都", "東京", 0.8),
        (json_equal, '{"a": 1, "b": [1, 2]}', '{"b": [1.0, 2], "a": 1}', 1),
        (json_equal, '```json\n{"a": 1}\n```', '{"a":1}', 1),
        (json_equal, 'Here it is: {"a": 1}.', '{"a":1}', 1),
        (json_equal, '{"a": true}', '{"a": 1}', 0),
        (json_equal, '{"a": "1"}', '{"a": 1}', 0),
        (json_equal, "[1, 2]", "[2, 1]", 0),
        (json_equal, "5", "5.0", 1),
        (json_equal, "nothing", "null", 0),
        (json_equal, '{"a": 1', '{"a": 1}', 0),
        (json_equal, "[" * 100_000, "[]", 0),
    ],
)
def test_metrics(metric: Any, prediction: str, reference: str, expected: float) -> None:
    assert metric(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("d.", "D"),
        ("B) Paris", "B"),
        ("A: because", "A"),
        ("The answer is (B).", "B"),
        ("So, my final answer:\n\nC", "C"),
        ("The correct answer is C. B is wrong, since", "C"),
        ("I'd choose option B because it is a mammal", "B"),
        ("It's A.", "A"),
        ("**D**", "D"),
        ("\\boxed{C}", "C"),
        ("正确答案是B。", "B"),
        ("答案：（Ｂ）", "B"),
        ("I think B is right", "B"),
        ("B and C", "C, B"),
        ("The answers are A and C", "A, C"),
        ("The correct answers: A, C", "A, C"),
        ("**Answer:** (A), (B) and (D).", "A, B, D"),
        ("the answers are a and c because", "A, C"),
        ("Both A and C are correct", "A, C"),
        ("答案是A和C", "A, C"),
        ("I choose B, A is wrong", "B"),
        ("The answer is A, C++ is not", "A"),
        ("The answer is A, and I am sure", "A"),
        ("The answer is A or B. Final answer: B", "B"),
    ],
)
def test_the_letter_of_a_choice(text: str, letter: str) -> None:
    assert choice(text, letter) == 1
    assert choice(text, "E") == 0


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "Paris",
            "A cat sat",
            "The answer is a bird",
            "Between A and B",
            "Answer: A or B",
            "A or B",
            "(A) or (B)",
        ),
        *("the answer is a or b", "The answer is A, or B.", "答案是A或B", "Answer: A, B or C"),
    ],
)
def test_no_letter_is_chosen(text: str) -> None:
    assert choice(text, "A") == choice(text, "B") == 0


def test_regex_compares_the_group_found_in_both() -> None:
    pattern = r"answer is (-?\d+)"
    assert regex("So the answer is 42.", "The answer is 42", pattern=pattern) == 1
    assert regex("So the answer is -42.", "The answer is 42", pattern=pattern) == 0
    assert regex("no idea", "The answer is 42", pattern=pattern) == 0
    assert find_metric(MetricSpec(name="regex", pattern=pattern))("answer is 1", "answer is 1") == 1


def test_a_pattern_that_takes_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftune.artifacts.metrics.PATTERN_SECONDS", 0.1)
    began = time.monotonic()
    with pytest.raises(FtuneError, match="searched one answer for 0.1 seconds"):
        regex("a" * 60 + "!", "b", pattern="(a|aa)+$")
    assert time.monotonic() - began < 5


def test_a_metric_of_an_installed_package_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = metadata.EntryPoint("length", "builtins:len", "ftune.metrics")
    found = metadata.EntryPoints([entry])
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: found.select(**wanted))
    assert find_metric(MetricSpec(name="length")) is len
    with pytest.raises(FtuneError, match="no metric `rouge`"):
        find_metric(MetricSpec(name="rouge"))


def specs(*names: str) -> list[MetricSpec]:
    return [MetricSpec(name=name) for name in names]


def said(*texts: str) -> list[Answer]:
    return [Answer(text, text) for text in texts]


def test_classes() -> None:
    references = ["positive", "negative", "positive", "neutral", "very positive"]
    answers = ["Positive.", "It is positive", "very positive", "no idea", "I say: very positive!"]
    found = measure_classes(answers, references)
    assert found.labels == ("positive", "negative", "neutral", "very positive")
    assert found.right == (True, False, False, False, True)
    assert found.accuracy == 0.4
    assert found.confusion == ((1, 0, 0, 1, 0), (1, 0, 0, 0, 0), (0, 0, 0, 0, 1), (0, 0, 0, 1, 0))
    # F1: positive 2 * 1 / (2 + 2), very positive 2 * 1 / (2 + 1), the others 0
    assert found.macro_f1 == pytest.approx((0.5 + 2 / 3) / 4)
    assert OTHER not in found.labels


def test_answers_of_their_own_are_no_classes() -> None:
    texts = [f"answer {i}" for i in range(51)]
    with pytest.raises(DataError, match="51 different ones, which are no classes"):
        measure_classes(texts, texts)


def test_scores_of_rows_and_of_all() -> None:
    found = score(specs("exact_match", "accuracy", "macro_f1"), said("Yes.", "no"), said("yes", "yes"))
    assert found.metrics == {"exact_match": 0.5, "accuracy": 0.5, "macro_f1": pytest.approx(2 / 3)}
    assert found.rows[1] == {"exact_match": 0.0, "accuracy": 0.0, "macro_f1": 0.0}
    assert found.classes is not None
    assert found.classes.labels == ("yes",)


def test_a_call_is_compared_as_a_call() -> None:
    reference = Answer('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', "", (("f", {"x": 1}),))
    same = Answer('{"arguments":{"x":1.0},"name":"f"}', "", (("f", {"x": 1.0}),))
    other = Answer('{"name": "f", "arguments": {"x": 2}}', "", (("f", {"x": 2}),))
    none = Answer("f(1)", "f(1)")
    for name in ("exact_match", "contains", "json"):
        found = score(specs(name), [same, other, none], [reference] * 3)
        assert [row[name] for row in found.rows] == [1, 0, 0]
    assert score(specs("strict"), [same], [reference]).metrics["strict"] == 0


def test_reasoning_is_compared_where_it_is_asked_for() -> None:
    answer, reference = Answer("4", "two and two: 4"), Answer("4", "4")
    asked = [MetricSpec(name="exact_match"), MetricSpec(name="exact_match", reasoning=True)]
    assert score(asked, [answer], [reference]).metrics == {"exact_match": 1.0, "exact_match with reasoning": 0.0}


def test_references_of_reasoning_alone_are_told() -> None:
    references = [Answer("", "<think>2 + 2</think>"), Answer("4", "4"), Answer("", ""), Answer("", "<t>", (("f", {}),))]
    assert "1 of 4 references are empty" in check_references(specs("exact_match"), references)[0]
    assert check_references([MetricSpec(name="exact_match", reasoning=True)], references) == []


def test_references_that_cannot_be_compared() -> None:
    assert check_references(specs("json", "exact_match"), said("{}", "[1]")) == []
    assert "1 of 2 references have not JSON" in check_references(specs("json"), said("{}", "no"))[0]
    with pytest.raises(DataError, match="no held-out answer has a letter to choose"):
        check_references(specs("choice"), said("Paris", "Rome"))
    digits = MetricSpec(name="regex", pattern=r"\d")
    with pytest.raises(DataError, match="what the pattern looks for"):
        check_references([digits], said("Paris"))
    assert key_of(digits, [digits, MetricSpec(name="regex", pattern="x")]) == r"regex \d"


def test_metrics_of_classes_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe(tmp_path, evaluation={"metrics": ["accuracy"]}).text)
    load_checked(path)
    monkeypatch.setattr("ftune.recipe.checks.is_installed", lambda name: name != "sklearn")
    with pytest.raises(RecipeError, match=r"pip install 'ftune\[metrics\]'"):
        load_checked(path)
    assert json.loads(path.read_text())["evaluation"]["metrics"] == ["accuracy"]
