"""`ftune leaderboard`: every study keeps its own table, and what cannot be read is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from experiments_pages import check_page
from typer.testing import CliRunner

from ftune.cli import app
from ftune.errors import RunDirError
from ftune.experiments.leaderboard import leaderboard, leaderboard_page, leaderboard_text


def study(label: str, score: float, *, model: str = "tiny/llama", data: str | None = "rows.jsonl") -> dict[str, Any]:
    """What ``compare.json`` holds of two methods, as far as a leaderboard reads it."""
    costs = {"memory": 2**30, "time": 60.0, "size": 2**20}
    method = {"method": "lora", "at_edge": False, "failures": [], "rate": 1e-4, "forgetting": None, "costs": costs}
    other = {"mean": score, "difference": {"d": 0.1, "lo": 0.05, "hi": 0.15}, "adjusted_p": 0.01, "relation": "better"}
    return {
        "verdict": {
            "sentence": f"{label} is better than lora by 10.0 points [5.0, 15.0].",
            "ties": [[label], ["lora"], ["base"]],
            "comparisons": {label: other, "base": other},
        },
        "metric": "f1",
        "margin": 0.01,
        "steps": 100,
        "seeds": [1, 2],
        "base": {"score": 0.1, "loss": 2.0},
        "left_out": {},
        "rows": {"compared": 50},
        "methods": [
            {**method, "label": "lora", "score": score - 0.1},
            {**method, "label": label, "score": score, "runs": [], "trials": []},
        ],
        "protocol": {"recipe": "recipe.yaml", "model": model, "trials": 5} | ({"data": data} if data else {}),
    }


def write(where: Path, result: dict[str, Any], since: str | None = None) -> None:
    where.mkdir(parents=True)
    if since is not None:
        result["protocol"]["environments"] = [{"since": since, "device": "H200", "versions": {}}]
    (where / "compare.json").write_text(json.dumps(result))


def test_studies_are_gathered_by_model_and_data_and_not_ranked(tmp_path: Path) -> None:
    write(tmp_path / "x/old", study("dora", 0.9), since="2026-01-02")
    write(tmp_path / "new", study("vera", 0.3), since="2026-11-02")
    write(tmp_path / "other", study("ia3", 0.99, model="another/model"))
    found = leaderboard(tmp_path)
    assert [(group["model"], len(group["studies"])) for group in found["groups"]] == [
        ("another/model", 1),
        ("tiny/llama", 2),
    ]
    # The newest first, though its scores are lower.
    assert [Path(one["path"]).name for one in found["groups"][1]["studies"]] == ["new", "old"]
    text = leaderboard_text(found, 120)
    assert text.index("vera is better") < text.index("dora is better")
    assert "+10.0 [+5.0, +15.0]" in text
    assert "50 test rows, 2 seeds, 5 rates a method, 100 steps a run, margin 1 points, on H200, 2026-11-02" in text
    assert "Only the rows of one table are comparable" in text
    assert max(map(len, leaderboard_text(found, 80).splitlines())) <= 80


def test_the_page_has_a_table_for_each_study_and_leads_to_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, study("dora", 0.5))
    (tmp_path / "b/compare.html").write_text("")
    (tmp_path / "pages").mkdir()
    found = leaderboard(tmp_path)
    page = leaderboard_page(found, tmp_path / "pages")
    tags = check_page(page, tmp_path / "pages")
    assert tags.seen.count("table") == 2
    assert sorted(tags.links) == ["../a/compare.json", "../b/compare.html"]
    assert page == leaderboard_page(leaderboard(tmp_path), tmp_path / "pages")


def test_what_cannot_be_read_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    write(tmp_path / "good", study("dora", 0.5, data=None))
    write(tmp_path / "cut", {"verdict": None})
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/compare.json").write_text("{")
    found = leaderboard(tmp_path)
    assert len(found["groups"]) == 1
    assert found["groups"][0]["data"] == "the data of recipe.yaml"
    assert sorted(Path(path).parent.name for path in found["unreadable"]) == ["cut", "torn"]
    assert "cannot be read" in leaderboard_text(found, 80)
    assert "cannot be read" in leaderboard_page(found, tmp_path)


def test_the_command_prints_writes_and_gives_json(tmp_path: Path) -> None:
    write(tmp_path / "a", study("dora", 0.5))
    out = tmp_path / "studies.html"
    done = CliRunner().invoke(app, ["leaderboard", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0
    assert "dora is better" in done.stdout
    check_page(out.read_text(), tmp_path)
    done = CliRunner().invoke(app, ["leaderboard", str(tmp_path), "--json"])
    assert json.loads(done.stdout) == leaderboard(tmp_path)


def test_no_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no study below"):
        leaderboard(tmp_path)
