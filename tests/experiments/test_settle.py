"""What a study begins with, and what may change once it has begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from ftune.errors import FtuneError, RecipeError, RunDirError
from ftune.experiments.settle import Settled, load_settled, settle, store_settled
from ftune.experiments.study import LoadedStudy, study_of
from ftune.experiments.trials import reason
from ftune.recipe import Loaded, load_recipe


@pytest.fixture
def base(tmp_path: Path) -> Loaded:
    return load_recipe(tiny.recipe_to_compare(tmp_path))


def study(base: Loaded, *methods: str, **options: Any) -> LoadedStudy:
    return study_of(base.path, methods=methods or "all", output_dir=str(base.path.parent / "study"), **options)


def begun(base: Loaded, *methods: str, steps: int | None = None) -> Settled:
    loaded = study(base, *methods)
    settled = settle(loaded, base, steps=steps)
    store_settled(loaded, settled)
    return settled


def test_all_runs_have_one_length_and_one_dtype(base: Loaded) -> None:
    settled = begun(base, "lora", "ia3")
    assert settled.common["training.max_steps"] == settled.steps == 4
    assert settled.common["model.dtype"] == "float32"
    assert settled.metric == "f1"
    assert settled.test_items == 8
    assert settled.priors.keys() == {"lora", "ia3"}
    assert load_settled(study(base, "lora", "ia3"), base) == settled


def test_a_method_that_cannot_work_is_left_out_of_all_and_refused_by_name(base: Loaded) -> None:
    options = {"search": {"method.rank": (4, 8)}}
    settled = settle(study(base, **options), base)
    assert "ia3" in settled.excluded
    assert "unknown field `rank`" in settled.excluded["ia3"]
    assert "lora" in settled.priors
    with pytest.raises(FtuneError, match="method `ia3` cannot take part"):
        settle(study(base, "ia3", **options), base)


def test_why_a_method_is_left_out_is_told_with_what_to_do() -> None:
    assert reason(FtuneError("no room\nfor it", help="make some")) == "no room (help: make some)"
    report = "error: unknown field\n  --> recipe\n  help: fields: a, b"
    assert reason(RecipeError([report])) == "unknown field (help: fields: a, b)"
    assert reason(FtuneError("no room")) == "no room"


def test_methods_and_seeds_may_be_added(base: Loaded) -> None:
    before = begun(base, "lora", steps=3)
    after = load_settled(study(base, "lora", "dora", seeds=5), base)
    assert after is not None
    assert after.steps == before.steps == 3
    assert after.common == before.common
    assert after.priors.keys() == {"lora", "dora"}


@pytest.mark.parametrize("name", ["all.jsonl", "test.jsonl"])
def test_other_rows_under_the_same_name_are_refused(name: str, base: Loaded) -> None:
    tests = tiny.write_chats(base.path.parent / "test.jsonl", 8)
    loaded = study(base, "lora", test=str(tests))
    store_settled(loaded, settle(loaded, base))
    assert load_settled(loaded, base) is not None
    tiny.write_chats(base.path.parent / name, 41)
    with pytest.raises(RunDirError, match="the data is not what the study"):
        load_settled(loaded, base)


@pytest.mark.parametrize(("options", "said"), [({"trials": 4}, "trials"), ({"metric": "exact_match"}, "metric")])
def test_another_study_is_refused(options: dict[str, Any], said: str, base: Loaded) -> None:
    begun(base, "lora")
    with pytest.raises(RunDirError, match=f"another {said}"):
        load_settled(study(base, "lora", **options), base)


@pytest.mark.parametrize(("metrics", "taken"), [(["macro_f1", "f1"], "f1"), (["macro_f1"], "rouge_l")])
def test_a_metric_that_is_no_mean_over_rows_is_not_taken(
    metrics: list[str], taken: str, base: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftune.experiments.settle.SHORT_ANSWER", 0)
    raw = {**base.raw, "evaluation": {**base.raw["evaluation"], "metrics": metrics}}
    base.path.write_text(yaml.safe_dump(json.loads(json.dumps(raw))))
    settled = settle(study(base, "lora"), load_recipe(base.path))
    assert settled.metric == taken
    assert settled.common["evaluation.metrics"] == [{"name": taken}]


def test_a_method_that_needs_other_rows_is_not_added(base: Loaded) -> None:
    # Prefix tuning cannot pack rows, so a study with it packs none, and the runs that are there may be packed.
    assert "data.packing" not in begun(base, "lora").common
    with pytest.raises(RunDirError, match=r"data\.packing would be another"):
        load_settled(study(base, "lora", "prefix"), base)
