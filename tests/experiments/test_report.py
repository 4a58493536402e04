"""`ftune report`: what runs recorded, paired by row where that is right, and no verdict that was not earned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from experiments_pages import check_page
from typer.testing import CliRunner

from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.training import train
from ftune.artifacts.tuned import reading
from ftune.cli import app
from ftune.errors import RunDirError
from ftune.experiments.report import (
    collect_runs,
    overview,
    report_markdown,
    report_page,
    settings,
    statements,
    write_report,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that were evaluated on the same rows."""
    where = tmp_path_factory.mktemp("runs")
    found = []
    for name, rank in (("a", 2), ("b", 4)):
        loaded = tiny.recipe(
            where,
            method={"rank": rank},
            evaluation={"metrics": ["exact_match", "f1"], "max_new_tokens": 8, "every_steps": 2},
            output_dir=str(where / name),
        )
        train(loaded)
        with reading(where / name) as target:
            evaluate(target, base=False)
        found.append(where / name)
    return found[0], found[1]


def with_scores(run: Path, out: Path, scores: list[float], **changes: Any) -> Path:
    """A copy of a run, with so many test rows of these scores."""
    out.mkdir(parents=True)
    for name in ("run.json", "metrics.jsonl"):
        (out / name).write_bytes((run / name).read_bytes())
    mean = sum(scores) / len(scores)
    (out / "eval.json").write_text(json.dumps({"rows": len(scores), "tuned": {"metrics": {"f1": mean}}}))
    rows = [
        {"row": i, "prompt": f"p{i}", "reference": f"r{i}", "tuned": {"answer": "x", "scores": {"f1": score}}} | changes
        for i, score in enumerate(scores)
    ]
    (out / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return out


def test_two_runs_side_by_side(runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = write_report(runs, tmp_path / "out", "ftune report a b")
    assert json.loads((tmp_path / "out/report.json").read_text()) == json.loads(json.dumps(result))
    assert result["differs"]["method.rank"] == [2, 4]
    assert "output_dir" not in result["differs"]
    assert "training.seed" not in result["differs"]
    assert ["method.rank", "2", "4"] in settings(result)[1]
    for run in result["runs"]:
        record = json.loads((Path(run["path"]) / "run.json").read_text())
        assert run["parameters"] == record["plan"]["method"]["trainable"]
        assert run["memory"] == record["measured"]["peak_bytes"]
        assert run["size"] > 0
        assert [step for step, _ in run["curves"]["train"]] == [1, 2, 3, 4]
        assert {2, 4} <= {step for step, _ in run["curves"]["held_out"]}
    assert [one["metric"] for one in result["differences"]] == ["exact_match", "f1"]
    assert {one["rows"] for one in result["differences"]} == {6}
    tags = check_page((tmp_path / "out/report.html").read_text(), tmp_path / "out")
    assert tags.seen.count("svg") == 1 + 2
    assert "not tuned alike" in (tmp_path / "out/report.md").read_text()
    first = (tmp_path / "out/report.html").read_bytes()
    write_report(runs, tmp_path / "out", "ftune report a b")
    assert (tmp_path / "out/report.html").read_bytes() == first


def test_the_command_prints_writes_and_gives_json(runs: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["report", *map(str, runs), "--output-dir", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "not tuned alike" in " ".join(done.stdout.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.json", "report.md"}
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(done.stdout) == json.loads((tmp_path / "out/report.json").read_text())


def test_one_run_alone(runs: tuple[Path, Path], tmp_path: Path) -> None:
    result, items = collect_runs(runs[:1])
    assert result["differences"] == []
    assert result["caution"] is None
    assert statements(result)[0].startswith("`a`: lora on")
    assert len(items) == 6
    tmp_path.joinpath("out").mkdir()
    tags = check_page(report_page(result, items, tmp_path / "out", "x"), tmp_path / "out")
    assert "select" not in tags.seen, "there is nothing to win against"


def test_a_difference_is_paired_and_never_called_better(runs: tuple[Path, Path], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random(60) * 0.5
    low = with_scores(runs[0], tmp_path / "low", list(noise))
    high = with_scores(runs[0], tmp_path / "high", list(noise + 0.3))
    result, _ = collect_runs([low, high])
    d = result["differences"][0]["difference"]
    assert d["d"] == pytest.approx(0.3)
    # Row by row all differ by as much: unpaired, the interval would be five times as wide.
    assert d["hi"] - d["lo"] < 0.05
    said = statements(result)
    assert "higher" in said[0]
    assert "not tuned alike" in said[-1]
    assert not any("better" in one for one in said)
    assert "lower" in statements(collect_runs([high, low])[0])[0]
    few = with_scores(runs[0], tmp_path / "few", list(noise[:40] + 0.3))
    assert "Paired over 60 test rows" in said[0]
    assert "Paired over 60 (`high`), 40 (`few`) test rows" in statements(collect_runs([low, high, few])[0])[0]
    assert "not told apart" in statements(collect_runs([low, with_scores(low, tmp_path / "as", list(noise))])[0])[0]


def test_a_mean_has_an_interval_around_it(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = with_scores(runs[0], tmp_path / "all", [1.0] * 50)
    lo, hi = collect_runs([run])[0]["runs"][0]["intervals"]["f1"]
    assert hi == 1.0
    assert 0.9 < lo < 1.0, "fifty of fifty do not show that all are right"
    half = with_scores(runs[0], tmp_path / "half", [0.0, 1.0] * 50)
    lo, hi = collect_runs([half])[0]["runs"][0]["intervals"]["f1"]
    assert (lo + hi) / 2 == pytest.approx(0.5)
    assert hi - lo == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.05)


def test_a_metric_that_is_no_mean_over_rows_has_no_interval(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = with_scores(runs[0], tmp_path / "macro", [0.0, 1.0] * 10)
    (run / "eval.json").write_text(json.dumps({"rows": 20, "tuned": {"metrics": {"f1": 0.4}}}))
    result, _ = collect_runs([run, with_scores(runs[0], tmp_path / "other", [0.0, 1.0] * 10)])
    assert result["runs"][0]["intervals"]["f1"] is None
    assert result["differences"] == []
    assert overview(result)[1][0][-1] == "40.0"


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"prompt": "another"}, "other test rows"), ({"row": 0}, "fewer than two"), (None, "kept no scores")],
)
def test_other_rows_are_not_compared(
    changes: dict[str, Any] | None, why: str, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    one = with_scores(runs[0], tmp_path / "one", [0.0, 1.0, 1.0])
    other = with_scores(runs[0], tmp_path / "other", [0.0, 1.0, 1.0], **(changes or {}))
    if changes == {"row": 0}:
        line = json.loads((one / "predictions.jsonl").read_text().splitlines()[0])
        (other / "predictions.jsonl").write_text(json.dumps(line) + "\n")
    if changes is None:
        (other / "eval.json").unlink()
    result, items = collect_runs([one, other])
    assert result["differences"] == []
    assert why in result["not_compared"]["other"]
    assert f"Not compared with `one`: `other`: {result['not_compared']['other']}." in statements(result)
    assert all(list(item["answers"]) == ["one"] for item in items)
    assert "Not compared" in report_markdown(result, tmp_path, "x")


def test_the_first_run_that_has_scores_is_compared_with(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = [with_scores(runs[0], tmp_path / name, [0.0, 1.0, 1.0]) for name in ("x", "y", "z")]
    (found[0] / "predictions.jsonl").unlink()
    result, items = collect_runs(found)
    assert result["against"] == "y"
    assert [one["run"] for one in result["differences"]] == ["z"]
    assert list(result["not_compared"]) == ["x"]
    assert list(items[0]["answers"]) == ["y", "z"]


def test_a_run_that_failed_early_is_shown_as_far_as_it_came(runs: tuple[Path, Path], tmp_path: Path) -> None:
    record = json.loads((runs[0] / "run.json").read_text()) | {"status": "failed", "measured": {}, "vitals_line": ""}
    del record["effect"], record["ended"]
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed/run.json").write_text(json.dumps(record))
    result, items = collect_runs([tmp_path / "failed"])
    assert "failed" in statements(result)[0]
    check_page(report_page(result, items, tmp_path, "x"), tmp_path)


def test_what_is_no_run_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no run directory"):
        collect_runs([tmp_path])
    with pytest.raises(RunDirError, match="given twice"):
        collect_runs([runs[0], runs[0] / "../a"])
    (tmp_path / "damaged").mkdir()
    run = with_scores(runs[0], tmp_path / "damaged/run", [1.0, 0.0])
    (run / "predictions.jsonl").write_text('{"row": 1}\n')
    with pytest.raises(RunDirError, match="cannot be read"):
        collect_runs([run])
