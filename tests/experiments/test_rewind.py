"""The curve of quality against forgetting: what is measured, once, and which point is the best."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from experiments_pages import check_page
from test_compare import make_study
from typer.testing import CliRunner

from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.tuned import find_target, scaled
from ftune.cli import app
from ftune.experiments.compare import compare
from ftune.experiments.markdown import markdown
from ftune.experiments.page import page
from ftune.experiments.rewind import best_point, curve, rewind_jobs, rewind_lines
from ftune.experiments.study import load_study
from ftune.experiments.trials import Trials
from ftune.run.checkpoint import FILES


def point(step: int, scale: float, quality: float, forgetting: float) -> dict[str, Any]:
    return {"step": step, "scale": scale, "quality": quality, "loss": 1.0, "forgetting": forgetting}


def test_the_best_point_forgets_least_within_the_margin() -> None:
    early, half, end = point(10, 1, 0.58, 0.00), point(40, 0.5, 0.603, 0.01), point(40, 1, 0.61, 0.05)
    assert best_point([early, half, end], 0.01) == half
    assert best_point([early, half, end], 0.03) == early
    assert best_point([early, half, end], 0.005) == end
    better = point(20, 1, 0.606, 0.01)
    assert best_point([early, half, better, end], 0.01) == better, "of two that forget alike the better one"
    assert best_point([point(1, 1, 0.59, -0.1), point(2, 1, 0.60, 0.0)], 0.01) == point(1, 1, 0.59, -0.1)
    assert best_point([], 0.01) is None


def test_a_line_says_where_it_is_and_how_it_is_made() -> None:
    def method(label: str, best: Any, merges: bool = True) -> dict[str, Any]:
        points = [point(10, 1, 0.6, 0.01), point(40, 0.5, 0.6, 0.02), point(40, 1, 0.61, 0.05)]
        return {"label": label, "rewind": {"points": points, "best": best, "command": "do it", "merges": merges}}

    methods = [
        method("lora", point(40, 0.5, 0.6, 0.02)),
        method("full", point(40, 1, 0.61, 0.05)),
        method("prompt", point(10, 1, 0.6, 0.01), merges=False),
        {"label": "failed"},
    ]
    lora, full, prompt = rewind_lines({"methods": methods, "metric": "f1", "steps": 40})
    assert lora == (
        "`lora`: best at scale 0.5 of its end, f1 60.0 %, forgets +0.020 (its end: f1 61.0 %, forgets +0.050): `do it`"
    )
    assert full == "`full`: its end is the best point, f1 61.0 %, forgets +0.050: `do it`"
    assert prompt.startswith("`prompt`: best after 10 of 40 steps")
    assert prompt.endswith("it cannot be merged, so only its checkpoints are compared")


def test_what_is_missing_is_measured_and_the_command_makes_the_best(tmp_path: Path) -> None:
    trials = Trials(tmp_path, cast(Any, None), {}, {}, "f1", 7)
    run = tmp_path / "runs/lora/r"
    (run / "checkpoints/step-10").mkdir(parents=True)
    (run / "checkpoints/step-10" / FILES[0]).write_text("")
    (run / "checkpoints/step-13").mkdir()  # of an interruption
    (run / "adapter").mkdir()
    (run / "adapter/adapter_model.safetensors").write_text("")
    (run / "run.json").write_text('{"status": "finished", "plan": {"method": {"artifact": "adapter"}}}')
    (tmp_path / "recipes/lora").mkdir(parents=True)

    def measured(out: Path, quality: float, forgetting: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        result = {"tuned": {"loss": 1.0, "metrics": {"f1": quality}}, "forgetting": {"loss": [forgetting, 0, 1]}}
        (out / "eval.json").write_text(json.dumps(result))

    def missing(method: str) -> list[tuple[str | None, float]]:
        jobs = rewind_jobs(trials, "lora", method, "r", 40)
        return [(job.message["checkpoint"], job.message["scale"]) for job in jobs]

    assert missing("lora") == [("10", 1), (None, 0.5), (None, 0.75), (None, 1)]
    assert missing("prompt") == [("10", 1), (None, 1)]
    measured(run, 0.6, 9.0)  # quality of the validation rows
    measured(tmp_path / "tests/lora/r", 0.1, 0.4)  # forgetting of the report
    measured(tmp_path / "rewind/lora/r-step-40-scale-0.5", 0.6, 0.1)
    trials.fail("lora", "r-step-40-scale-0.75", "out of memory")
    assert missing("lora") == [("10", 1)]
    found = curve(trials, "lora", "lora", "r", 40, 0.01)
    assert found["points"] == [point(40, 0.5, 0.6, 0.1), point(40, 1.0, 0.6, 0.4)]
    assert found["command"] == f"ftune merge {run} --scale 0.5"
    measured(tmp_path / "rewind/lora/r-step-10", 0.595, 0.0)
    shutil.rmtree(run / "adapter")  # what was measured stays, without weights
    shutil.rmtree(run / "checkpoints")
    assert missing("lora") == []
    assert curve(trials, "lora", "lora", "r", 40, 0.01)["command"] == f"ftune merge {run} --step 10"
    assert curve(trials, "lora", "prompt", "r", 40, 0.01)["command"] == f"ftune chat {run} --step 10"


@pytest.mark.slow
def test_a_study_rewinds_the_chosen_run_of_each_method(tmp_path: Path) -> None:
    study = make_study(tmp_path, methods=["lora", "prompt"], rewind=True, margin=40)
    told: list[str] = []
    result = compare(load_study(study), tell=told.append)
    assert result is not None
    found = {method["label"]: method["rewind"] for method in result["methods"]}
    assert [(p["step"], p["scale"]) for p in found["prompt"]["points"]] == [(1, 1), (2, 1), (4, 1)]
    assert [(p["step"], p["scale"]) for p in found["lora"]["points"]] == [(1, 1), (2, 1), (4, 0.5), (4, 0.75), (4, 1)]
    assert found["lora"]["best"] == best_point(found["lora"]["points"], 0.4)
    chosen, other = (tmp_path / "study" / run["run"] for run in result["methods"][0]["runs"])
    assert sorted(path.name for path in chosen.glob("checkpoints/*")) == ["step-1", "step-2"]
    for run, keep in ((chosen, 6), (other, 1)):
        recipe = yaml.safe_load((tmp_path / f"study/recipes/lora/{run.name}.yaml").read_text())
        assert recipe["checkpoint"]["keep"] == keep

    # What a point holds is what `ftune eval` measures there, on the validation rows.
    again = evaluate(scaled(find_target(chosen), 0.5), base=False, forgetting=True, out=tmp_path / "again")
    half = next(p for p in found["lora"]["points"] if p["scale"] == 0.5)
    assert half["quality"] == again["tuned"]["metrics"]["f1"]
    assert half["loss"] == pytest.approx(again["tuned"]["loss"], rel=1e-6)
    assert half["forgetting"] == pytest.approx(again["forgetting"]["loss"][0], abs=1e-6)
    end = next(p for p in found["lora"]["points"] if (p["step"], p["scale"]) == (4, 1))
    assert end["forgetting"] == result["methods"][0]["forgetting"]["loss"][0]

    # Nothing twice; what is missing, and nothing else, is measured again.
    count = len(told)
    assert compare(load_study(study), tell=told.append) == result
    assert len(told) == count
    shutil.rmtree(tmp_path / f"study/rewind/lora/{chosen.name}-step-4-scale-0.75")
    repeated = compare(load_study(study), tell=told.append)
    assert told[count:] == [f"lora {chosen.name}-step-4-scale-0.75: measured on the validation rows and neutral text"]
    assert repeated is not None
    assert repeated["methods"] == result["methods"]

    text = page(result, tmp_path / "study", "x")
    tags = check_page(text, tmp_path / "study")
    without = {**result, "methods": [{k: v for k, v in m.items() if k != "rewind"} for m in result["methods"]]}
    before = check_page(page(without, tmp_path / "study", "x"), tmp_path / "study")
    assert tags.seen.count("svg") == before.seen.count("svg") + 2
    for shown in (text, markdown(result, "x")):
        assert found["lora"]["command"] in shown
    program, *arguments = shlex.split(found["lora"]["command"])
    assert program == "ftune"
    said = CliRunner().invoke(app, [*arguments, "--json"])
    assert said.exit_code == 0, said.output
    report = json.loads((chosen / "merged/merge.json").read_text())
    best = found["lora"]["best"]
    assert (report["checkpoint"] or "step-4", report["scale"]) == (f"step-{best['step']}", best["scale"])
