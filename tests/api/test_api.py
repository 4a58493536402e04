"""The way in from Python, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

import ftune
from ftune.recipe import load_recipe


def fields(where: Path, **blocks: Any) -> dict[str, Any]:
    """A recipe as someone would write it in Python."""
    made: dict[str, Any] = json.loads(json.dumps(tiny.recipe(where, **blocks).raw))
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ftune.Run:
    return ftune.train(fields(tmp_path_factory.mktemp("api")), progress=False)


ROOT = Path(ftune.__file__).parent.parent


def python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.strip()


def test_importing_ftune_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'pydantic', 'numpy', 'yaml', 'typer', 'rich'}"
    assert python(f"import sys, ftune; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_loading_a_recipe_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").touch()
    given = {"model": "org/tiny", "method": "lora", "data": str(tmp_path / "d.jsonl"), "output_dir": "x"}
    assert python(f"import sys, ftune; ftune.load({given}); print('torch' in sys.modules)") == "False"


def test_every_name_is_there() -> None:
    for name in ftune.__all__:
        assert getattr(ftune, name) is not None
    assert set(ftune.__all__) <= set(dir(ftune))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        ftune.trian  # noqa: B018


@pytest.mark.parametrize("first", ["import ftune.plan.resolve", "from ftune import plan", "pass"])
def test_plan_is_a_package_and_a_function(first: str) -> None:
    said = python(f"{first}\nimport ftune, ftune.plan.table\nprint(callable(ftune.plan), ftune.plan.table.__name__)")
    assert said == "True ftune.plan.table"


def test_a_recipe_is_validated_when_it_is_made() -> None:
    given: dict[str, Any] = {"model": "org/tiny", "method": {"name": "dora", "rank": 3}, "data": "d.jsonl"}
    recipe = ftune.Recipe(**given, output_dir="x")
    assert (recipe.method.name, recipe.method.rank, recipe.output_dir) == ("dora", 3, Path("x"))
    assert recipe == ftune.Recipe(**given, output_dir="x") != ftune.Recipe(**given, output_dir="y")
    assert repr(recipe).startswith("<Recipe>\nmodel: org/tiny\nmethod:\n  name: dora")
    assert "<pre>model: org/tiny" in recipe._repr_html_()
    with pytest.raises(ftune.RecipeError, match="unknown field `outputdir` in the recipe"):
        ftune.Recipe(**given, outputdir="x")
    with pytest.raises(AttributeError, match="never changes"):
        recipe.model = "other"


def test_loading_checks_this_machine() -> None:
    with pytest.raises(ftune.RecipeError, match="--> data.train.path|--> data"):
        ftune.load({"model": "org/tiny", "method": "lora", "data": "nowhere.jsonl", "output_dir": "x"})


def test_overrides_of_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(fields(tmp_path)))
    recipe = ftune.load(path, {"training.max_steps": 20})
    assert recipe.training.max_steps == 20
    again = ftune.load(recipe, {"training.seed": 1})
    assert (again.training.max_steps, again.training.seed) == (20, 1)
    assert recipe.training.seed == 7
    assert ftune.load(str(path), ["training.max_steps=20"]) == recipe


def test_a_plan(tmp_path: Path) -> None:
    planned = ftune.plan(fields(tmp_path), {"training.max_steps": 3})
    assert planned.steps == 3
    memory = planned.memory
    parts = memory.weights + memory.adapters + memory.gradients + memory.optimizer + memory.activations
    assert memory.total == parts + memory.logits + memory.buffers + memory.runtime > 0
    assert planned.fits
    assert "steps" in str(planned)
    assert not ftune.plan(fields(tmp_path), device="1MiB").fits


def test_training_leaves_a_recipe_that_trains_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    heard, told = tiny.Heard(), list[str]()
    given = fields(tmp_path)
    capsys.readouterr()
    run = ftune.train(given, {"training.max_steps": 3}, sinks=[heard], tell=told.append, progress=False)
    assert (run.path, run.status, run.artifact.name) == (tmp_path / "run", "finished", "adapter")
    assert [event.step for event in heard.events if event.name == "step"] == [1, 2, 3]
    assert heard.closed
    assert capsys.readouterr().err == ""
    losses = run.metrics.losses
    assert len(losses) == 3
    kept = run.path / "recipe.yaml"
    assert load_recipe(kept).recipe.training.max_steps == 3
    again = ftune.train(kept, {"output_dir": str(tmp_path / "again")}, progress=False, tell=told.append)
    assert again.metrics.losses == losses
    with pytest.raises(ftune.RunDirError, match="already holds a run"):
        ftune.train(given, progress=False)
    replaced = ftune.train(given, overwrite=True, progress=False, tell=told.append)
    assert len(replaced.metrics.steps) == 4
    assert load_recipe(kept).recipe.training.max_steps == 4


def test_pausing_and_going_on(tmp_path: Path) -> None:
    given = fields(tmp_path)
    run = ftune.train(given, until=2, progress=False)
    assert run.status == "paused"
    assert "paused after step 2" in str(run)
    assert ftune.train(given, resume=True, progress=False).status == "finished"
    assert [step.step for step in run.metrics.steps] == [1, 2, 3, 4]


def test_what_a_run_shows(run: ftune.Run) -> None:
    assert repr(run).startswith("<Run>\ndone: 4 steps")
    assert run._repr_html_().startswith("<pre>done: 4 steps")
    assert run.metrics.evals[-1].loss == run.record["measured"]["held_out_loss"]
    assert ftune.Run(str(run.path)) == run  # type: ignore[arg-type]


def test_evaluating(run: ftune.Run) -> None:
    found = run.evaluate(base=True)
    assert found.tuned is not None
    assert found.base is not None
    assert found.tuned["loss"] != found.base["loss"]
    assert "tuned" in repr(found)
    assert json.loads((run.path / "eval.json").read_text())["tuned"]["loss"] == found.tuned["loss"]
    with pytest.raises(ftune.FtuneError, match="`limit` is of `tasks`"):
        run.evaluate(limit=3)


def test_a_recipe_stands_for_its_run(run: ftune.Run) -> None:
    recipe = ftune.load(run.path / "recipe.yaml")
    by_recipe, by_path = ftune.evaluate(recipe), ftune.evaluate(str(run.path))
    assert by_recipe.tuned is not None
    assert by_path.tuned is not None
    assert by_recipe.tuned["loss"] == by_path.tuned["loss"]


def test_merging_and_converting(run: ftune.Run, tmp_path: Path) -> None:
    merged = run.merge(tmp_path / "merged")
    assert (merged.path, (merged.path / "config.json").is_file()) == (tmp_path / "merged", True)
    assert "merged" in str(merged)
    with pytest.raises(ftune.FtuneError, match="plain LoRA already"):
        ftune.convert(run)
    with pytest.raises(ftune.FtuneError, match="not a dtype"):
        ftune.merge(run, dtype="float16")


def test_converting(tmp_path: Path) -> None:
    given = fields(tmp_path) | {"method": {"name": "vera", **tiny.SETTINGS["vera"]}}
    converted = ftune.train(given, progress=False).convert(tmp_path / "lora")
    assert (converted.path, (converted.path / "adapter_config.json").is_file()) == (tmp_path / "lora", True)
    assert repr(converted).startswith("<Conversion>\nconverted: ")


def test_answers(run: ftune.Run) -> None:
    asked = ["Say hi.", "Two plus two?"]
    both = run.generate(asked, max_new_tokens=8)
    assert both.prompts == tuple(asked)
    assert list(both) == [run.generate(text, max_new_tokens=8)[0] for text in asked]
    assert all(both)
    assert len(ftune.generate(run, "Say hi.", base=True, max_new_tokens=4)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"accept_changed_data": True}, "accept_changed_data goes with resume"),
        ({"engine": "ray"}, "go together"),
        ({"num_processes": 2, "sinks": [tiny.Heard()]}, "sinks: not with num_processes=2"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ftune.FtuneError, match=said):
        ftune.train(fields(tmp_path), **options)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    given = fields(tmp_path)
    before = ftune.plan(given).summary["model"]["parameters"]
    tiny.model_dir(tmp_path / "base", num_hidden_layers=3)
    assert ftune.plan(given).summary["model"]["parameters"] > before


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda recipe: ftune.plan(recipe, num_processes=0), "num_processes=0: at least 1"),
        (lambda recipe: ftune.train(recipe, num_processes=-2), "num_processes=-2: at least 1"),
        (lambda recipe: ftune.train(recipe, until=0), "until=0: at least 1"),
        (lambda recipe: ftune.train(recipe, engine="ray", num_workers=0), "num_workers=0: at least 1"),
        (lambda recipe: ftune.evaluate(recipe, tasks=["hellaswag"], limit=0), "limit=0: at least 1"),
        (lambda recipe: ftune.evaluate(recipe, tasks=["hellaswag"], shots=-1), "shots=-1: at least 0"),
        (lambda recipe: ftune.generate(recipe, "Hi.", max_new_tokens=0), "max_new_tokens=0: at least 1"),
        (lambda recipe: ftune.generate(recipe, "Hi.", temperature=-1.0), "temperature=-1: at least 0"),
        (lambda recipe: ftune.convert(recipe, rank=0), "rank=0: at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(call: Any, said: str) -> None:
    with pytest.raises(ftune.FtuneError, match=said):
        call({"model": "none", "method": "lora", "data": "none.jsonl", "output_dir": "none"})
