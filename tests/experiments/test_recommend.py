"""What to try before any training: what fits and is not too long, what is known, what was found before."""

from __future__ import annotations

import json
from pathlib import Path

import tiny

from ftune.experiments.fits import Fit
from ftune.experiments.recommend import recommend, recommendation_text, study_text
from ftune.experiments.study import load_study

FITS = [
    Fit("full", "does not fit", "--set x", 9),
    Fit("lora", "fits", "", 5, seconds=50.0),
    Fit("dora", "may just fit", "", 6, seconds=70.0),
    Fit("prefix", None, "no packing"),
]


def test_what_fits_in_memory_and_time_is_recommended(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    made = recommend(recipe, FITS, None, tmp_path)
    assert made.methods == ("lora", "dora")
    made = recommend(recipe, FITS, 60.0, tmp_path)
    assert made.methods == ("lora",)
    assert made.too_long == ("dora",)
    text = recommendation_text(made, 60.0, 80)
    assert "takes longer than 1m00s: dora" in text
    assert "arXiv" in text
    assert max(map(len, text.splitlines())) <= 80


def test_earlier_studies_of_the_same_model_come_first(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    for name, model in (("a", "other/model"), ("b", recipe.model.id)):
        (tmp_path / name).mkdir()
        result = {"protocol": {"model": model}, "verdict": {"sentence": f"Verdict {name}."}}
        (tmp_path / name / "compare.json").write_text(json.dumps(result))
    (tmp_path / "c").mkdir()
    (tmp_path / "c/compare.json").write_text("{")
    made = recommend(recipe, FITS, None, tmp_path)
    assert [study.verdict for study in made.earlier] == ["Verdict b.", "Verdict a."]


def test_the_study_that_is_written_is_one(tmp_path: Path) -> None:
    made = recommend(tiny.recipe(tmp_path).recipe, FITS, None, tmp_path)
    (tmp_path / "s.yaml").write_text(study_text("recipe.yaml", made))
    assert [candidate.label for candidate in load_study(tmp_path / "s.yaml").candidates] == ["lora", "dora"]
