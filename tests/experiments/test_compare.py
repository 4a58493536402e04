"""A whole study on a tiny model: every run an ordinary one, the same bytes however often it was killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import tiny
import yaml
from experiments_pages import check_page

from ftune.artifacts.run_dir import RunDir
from ftune.errors import DataError, RunDirError
from ftune.experiments.compare import compare
from ftune.experiments.forecast import Forecast
from ftune.experiments.markdown import markdown, summary
from ftune.experiments.page import page
from ftune.experiments.pool import Job, Pool
from ftune.experiments.study import load_study
from ftune.experiments.tuning import grid
from ftune.run.lock import RunLock

pytestmark = pytest.mark.slow


def make_study(where: Path, **fields: Any) -> Path:
    """A study of two methods on the tiny model, with rows of their own."""
    study = {
        "recipe": str(tiny.recipe_to_compare(where)),
        "methods": ["lora", "ia3"],
        "trials": 3,
        "seeds": 2,
        "output_dir": str(where / "study"),
        **fields,
    }
    (where / "study.yaml").write_text(yaml.safe_dump(study))
    return where / "study.yaml"


def without_costs(path: Path) -> dict[str, Any]:
    """What a study found, without what the clock and the allocator say, and so without which of equals is cheapest."""
    result: dict[str, Any] = json.loads(path.read_text())
    del result["time"]
    for method in result["methods"]:
        del method["costs"], method["tokens_per_second"]
    for name in ("take", "sentence"):
        del result["verdict"][name]
    return result


def test_a_study_from_nothing_to_its_report(tmp_path: Path) -> None:
    loaded = load_study(make_study(tmp_path))
    told: list[str] = []
    result = compare(loaded, tell=told.append)
    assert result is not None
    assert {method["label"] for method in result["methods"]} == {"lora", "ia3"}
    assert result["rows"]["test"] == result["rows"]["compared"] == 8
    for method in result["methods"]:
        assert len(method["runs"]) == 2
        assert method["score"] is not None
        assert all(method["costs"].values())
        assert method["parameters"] > 0
        assert method["tokens_per_second"] > 0
        assert method["exports"]["merge"]["error"] <= 1e-3
        assert method["exports"]["load"]["error"] <= 1e-3
        assert sum(trial["quality"] is not None for trial in method["trials"]) >= 2
        for run in method["runs"]:
            record = RunDir(tmp_path / "study" / run["run"]).read()
            assert record["status"] == "finished"
            assert run["vitals"] == record["vitals_line"]
    # No step twice: what was halved stopped where it was told to, and the chosen one is the first seed's run.
    steps = [len(tiny.events(run, "step")) for run in sorted((tmp_path / "study/runs/lora").iterdir())]
    assert sorted(steps)[:1] == [1]
    assert max(steps) == 4
    assert list((tmp_path / "study/speed").iterdir())
    assert not list((tmp_path / "study/speed").glob("*/checkpoints")), "only time and memory were wanted"
    assert not list((tmp_path / "study/runs").glob("*/*/checkpoints"))
    written = (tmp_path / "study/compare.json").read_bytes()
    told.clear()
    assert compare(loaded, tell=told.append) == result
    assert not told
    assert (tmp_path / "study/compare.json").read_bytes() == written
    assert str(result["verdict"]["sentence"]) in markdown(result, "ftune compare study.yaml")
    assert "lora" in summary(result, "study", 80)
    tags = check_page(page(result, tmp_path / "study", "ftune compare study.yaml"), tmp_path / "study")
    # Against LoRA, four costs, and two pictures for each method.
    assert tags.seen.count("svg") == 1 + 4 + 2 * len(result["methods"])
    assert tags.seen.count("details") >= result["rows"]["test"]
    assert page(result, tmp_path / "study", "x") == page(result, tmp_path / "study", "x")


def test_a_study_that_is_killed_ends_in_the_same(tmp_path: Path) -> None:
    results = []
    # Killed once each of these is told: while speed is measured, in tuning, and after it.
    for name, kills in (("alone", []), ("killed", ["lora speed 0:", "1 of 4 steps", "on the validation rows"])):
        where = tmp_path / name
        where.mkdir()
        study = make_study(where, methods=["lora"])
        for line in [*kills, None]:
            process = subprocess.Popen(
                [sys.executable, "-m", "ftune", "compare", str(study), "--yes"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            assert process.stderr is not None
            with process.stderr:
                if line is not None and any(line in told for told in process.stderr):
                    process.kill()
                else:
                    process.stderr.read()
            assert process.wait() == (0 if line is None else -signal.SIGKILL)
        text = json.dumps(without_costs(where / "study/compare.json"))
        results.append(text.replace(str(where), "HERE"))
    assert results[0] == results[1]


def test_a_run_that_somebody_reads_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftune.experiments.worklist.WAIT_SECONDS", 0.1)
    loaded, root = load_study(make_study(tmp_path, methods=["lora"], seeds=1)), tmp_path / "study"
    waiting: list[str] = []
    with ExitStack() as readers:

        def tell(line: str) -> None:
            if "1 of 4 steps" in line and not waiting:  # which of the trials go on is not known yet
                name = line.split()[1].rstrip(":")
                readers.enter_context(RunLock(root / "runs/lora" / name, shared=True))
            if "in use" in line:
                waiting.append(line)
                Timer(1.0, readers.close).start()

        result = compare(loaded, tell=tell)
    assert result is not None
    assert len(waiting) == 1, "it is told once"
    assert not list(root.glob("recipes/*/*.failed"))
    assert result["methods"][0]["failures"] == []


def test_a_study_goes_on_elsewhere_only_where_its_anchor_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ftune.experiments.forecast.FEWEST_STEPS", 1)
    study = make_study(tmp_path, methods=["lora"], seeds=1, budget="7 steps")
    loaded, root = load_study(study), tmp_path / "study"

    class Stopped(Exception):
        pass

    def stop(line: str) -> None:
        if line.startswith("lora rate-"):
            raise Stopped

    with pytest.raises(Stopped):
        compare(loaded, tell=stop)
    (here,) = json.loads((root / "environments.json").read_text())
    here["versions"]["torch"] = "0.1"
    (root / "environments.json").write_text(json.dumps([here]))
    (trial,) = root.glob("runs/lora/*/metrics.jsonl")
    events = [json.loads(line) for line in trial.read_text().splitlines()]
    for factor in (1.01, 1 / 1.01):
        for event in events:
            event["loss"] = event["loss"] * factor if event["event"] == "step" else event.get("loss")
        trial.write_text("".join(f"{json.dumps(event)}\n" for event in events))
        if factor > 1:
            with pytest.raises(RunDirError, match=r"torch 0\.1 then(.|\n)*LoRA's loss at step 1"):
                compare(loaded)
    told: list[str] = []
    result = compare(loaded, tell=told.append)
    assert result is not None
    assert [one["versions"]["torch"] == "0.1" for one in result["protocol"]["environments"]] == [True, False]
    assert result["steps"] < 4, "the budget allows fewer than the recipe has"
    assert "the anchor agrees" in told
    assert "lora speed 0" in " ".join(told), "time and memory are of one place"
    assert not (root / "anchor").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra `ray`: pip install 'ftune[ray]'")
def test_a_study_on_ray_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    results = []
    for name in ("here", "ray"):
        where = tmp_path / name
        where.mkdir()
        assert compare(load_study(make_study(where, methods=["lora"])), ray=name == "ray")
        text = json.dumps(without_costs(where / "study/compare.json"))
        results.append(text.replace(str(where), "HERE"))
    assert results[0] == results[1]


def test_a_method_that_fails_is_told_and_the_rest_go_on(tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=1, methods=["lora", {"name": "lora", "label": "broken", "rank": 8}])
    loaded = load_study(study)

    def agree(forecast: Forecast) -> bool:
        # In the place of its runs is something that ftune did not make.
        for setting in grid(forecast.settled.priors["broken"], 3, {}):
            run = tmp_path / "study/runs/broken" / setting.name
            run.mkdir(parents=True)
            (run / "notes.txt").write_text("not a run")
        return True

    result = compare(loaded, agree=agree)
    assert result is not None
    broken = next(method for method in result["methods"] if method["label"] == "broken")
    assert broken["failures"] == ["every trial failed"]
    assert all("is no run directory" in trial["failed"] for trial in broken["trials"])
    assert broken["score"] is None
    assert "`broken` failed" in markdown(result, "")
    assert next(method for method in result["methods"] if method["label"] == "lora")["score"] is not None


def test_a_row_that_does_not_fit_is_named_in_the_users_file(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    with (tmp_path / "all.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    with pytest.raises(DataError, match=r"[^/]*/all\.jsonl:41"):
        compare(load_study(study))


def test_a_job_that_breaks_is_a_failure_and_not_the_end(tmp_path: Path) -> None:
    waiting = [Job("a", "1", {"kind": "unknown"}), Job("b", "1", {"kind": "train", "recipe": "none.yaml", "until": 1})]
    results: dict[str, str] = {}

    def done(job: Job, result: Any) -> None:
        waiting.remove(job)
        results[job.label] = result["failed"]

    with Pool((), tmp_path / "log") as pool:
        pool.do(lambda: list(waiting), done)
    assert "unknown" in results["a"]
    assert "no such recipe" in results["b"]


def test_a_study_goes_on_without_its_weights(tmp_path: Path) -> None:
    first = compare(load_study(make_study(tmp_path, methods=["lora"])))
    assert first is not None
    written = (tmp_path / "study/compare.json").read_bytes()
    for weights in (tmp_path / "study").rglob("*.safetensors"):
        weights.unlink()
    told: list[str] = []
    assert compare(load_study(tmp_path / "study.yaml"), tell=told.append) == first
    assert not told
    assert (tmp_path / "study/compare.json").read_bytes() == written

    both = compare(load_study(make_study(tmp_path, methods=["lora", "ia3"])), tell=told.append)
    assert both is not None
    assert not [line for line in told if line.startswith("lora") and "speed" not in line], "nothing of it is trained"
    of = {method["label"]: method for method in both["methods"]}
    assert of["lora"]["runs"] == first["methods"][0]["runs"]
    assert of["lora"]["costs"]["size"] == first["methods"][0]["costs"]["size"]
    assert len(of["ia3"]["runs"]) == 2


def test_what_is_asked_for_later_is_measured_on_a_run_trained_again(tmp_path: Path) -> None:
    first = compare(load_study(make_study(tmp_path, methods=["lora"])))
    assert first is not None
    for weights in (tmp_path / "study").rglob("*.safetensors"):
        weights.unlink()
    told: list[str] = []
    again = compare(load_study(make_study(tmp_path, methods=["lora"], rewind=True)), tell=told.append)
    assert again is not None
    (method,) = again["methods"]
    assert sum("trained again in" in line for line in told) == 1
    assert method["runs"] == first["methods"][0]["runs"], "what was tested stays"
    assert method["again"]["then"] == pytest.approx(method["again"]["now"], rel=1e-4)
    assert len(method["rewind"]["points"]) > 1
    assert "was trained again" in markdown(again, "ftune compare study.yaml")
