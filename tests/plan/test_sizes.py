"""``ftune plan --sizes``: what a recipe would need on a model that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from ftune.errors import FtuneError
from ftune.plan.resolve import resolve
from ftune.plan.sizes import find_sizes, known_sizes
from ftune.plan.summary import summary_of

SHAPES = Path(__file__).parents[2] / "ftune/shapes"


def planned(where: Path, method: str, settings: dict[str, object], optimizer: str, shape: str) -> dict[str, int]:
    recipe = tiny.recipe(where, method, optimizer={"name": optimizer}).recipe
    changed = recipe.model_copy(update={"method": type(recipe.method)(**settings)})
    plan = resolve(changed, sizes=SHAPES / shape)
    assert summary_of(plan)["model"]["id"].endswith(shape)
    assert "sizes only" in summary_of(plan)["warnings"][0]
    return plan.memory.as_dict()


def test_galore_s_headline_on_a_7b_model(tmp_path: Path) -> None:
    full = planned(tmp_path, "full", {}, "adamw", "llama-2-7b")["optimizer"]
    galore = planned(tmp_path, "galore", {"rank": 1024}, "adamw", "llama-2-7b")["optimizer"]
    in_8bit = planned(tmp_path, "galore", {"rank": 1024}, "adamw_8bit", "llama-2-7b")["optimizer"]
    assert full == 8 * 6_738_415_616
    # GaLore (arXiv:2403.03507), abstract: "up to 65.5 % in optimizer states"; in 8 bits 82.5 % less than bf16 moments.
    assert 1 - galore / full == pytest.approx(0.655, abs=0.01)
    assert 1 - in_8bit / (full / 2) == pytest.approx(0.825, abs=0.01)


def test_the_sizes_are_the_other_model_s(tmp_path: Path) -> None:
    small = planned(tmp_path, "lora", {"rank": 8}, "adamw", "smollm2-135m")
    large = planned(tmp_path, "lora", {"rank": 8}, "adamw", "llama-3-8b")
    assert 40 < large["weights"] / small["weights"] < 70


def test_galore_s_own_levers_are_named(tmp_path: Path) -> None:
    # Advice is given where a run does not fit; a large GPU has room for this one.
    recipe = tiny.recipe(tmp_path, "galore", training={"memory_gib": 16}).recipe
    recipe = recipe.model_copy(update={"method": type(recipe.method)(rank=1024)})
    summary = summary_of(resolve(recipe, sizes=SHAPES / "llama-2-7b"))
    advice = "\n".join(summary["advice"])
    assert "method.weights: bfloat16, with model.dtype: bfloat16: saves" in advice
    assert "per_layer: true (with gradient_accumulation_steps: 1" in advice
    assert any("one subspace for the whole run" in line for line in summary["warnings"])


def test_a_decay_that_reaches_nothing_is_said(tmp_path: Path) -> None:
    for name, said in (("ia3", True), ("lora", False)):
        warnings = summary_of(resolve(tiny.recipe(tmp_path, name, optimizer={"weight_decay": 0.1}).recipe))["warnings"]
        assert any("weight_decay has no effect" in line for line in warnings) == said


def test_sizes_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "llama-3-8b" in known_sizes()
    assert find_sizes("llama-3-8b") == find_sizes("Llama-3-8B") == SHAPES / "llama-3-8b"
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    assert find_sizes("own") == find_sizes("own/config.json") == Path("own")


@pytest.mark.parametrize("text", ["llama3-8b", "configs/shapes/llama-3-8b", "meta/llama-3-8b"])
def test_other_names_are_refused_with_the_nearest(text: str) -> None:
    with pytest.raises(FtuneError, match="no such model") as refused:
        find_sizes(text)
    assert refused.value.help is not None
    assert refused.value.help.startswith("did you mean `llama-3-8b`?")
    assert "mistral-7b" in refused.value.help
    with pytest.raises(FtuneError) as refused:
        find_sizes("gpt-5")
    assert "did you mean" not in str(refused.value.help)


def test_the_sizes_are_part_of_the_package() -> None:
    # The wheel takes all of ftune/ (pyproject.toml); a name that is found there is found wherever it is installed.
    import ftune

    assert find_sizes("mistral-7b").is_relative_to(Path(ftune.__file__).parent)
