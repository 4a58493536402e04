"""The rows of a study: drawn once, equal rows together, and refused where they changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftune.errors import DataError, RunDirError
from ftune.experiments.rows import Drawn, draw
from ftune.recipe.schema import DataSpec


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def rows_of(block: dict[str, Any]) -> list[str]:
    return Path(block["path"]).read_text().splitlines()


def drawn(tmp_path: Path, test: str | None = None, *, begun: bool = False, **data: Any) -> Drawn:
    spec = DataSpec.model_validate({"train": {"path": str(tmp_path / "rows.jsonl")}, **data})
    return draw(spec, test, tmp_path / "out", begun=begun)


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(count)]


def test_a_fifth_is_for_the_report_a_tenth_to_choose_by_and_no_row_is_lost(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(100))
    found = drawn(tmp_path)
    assert found.counts == {"train": 70, "validation": 10, "test": 20}
    assert set(found.drawn) == {"test", "validation"}
    parts = [rows_of(block) for block in (found.data["train"], found.data["eval"], found.test)]
    assert sorted(row for part in parts for row in part) == sorted(map(json.dumps, pairs(100)))
    assert sorted(parts[0], key=lambda row: int(row.split()[-1].rstrip('"}'))) == parts[0]  # in their first order
    again = drawn(tmp_path)
    assert again == found
    assert [rows_of(block) for block in (again.data["train"], again.data["eval"], again.test)] == parts


def test_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(30) * 3)
    found = drawn(tmp_path)
    sides = [set(rows_of(block)) for block in (found.data["train"], found.data["eval"], found.test)]
    assert not sides[0] & sides[1]
    assert not sides[0] & sides[2]
    assert not sides[1] & sides[2]


def test_what_the_recipe_holds_out_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(100))
    write(tmp_path / "held.jsonl", pairs(7))
    found = drawn(tmp_path, eval={"path": str(tmp_path / "held.jsonl")})
    assert "eval" not in found.data
    assert found.counts == {"train": 80, "validation": None, "test": 20}
    assert (
        drawn(tmp_path / "..", **{"train": {"path": str(tmp_path / "rows.jsonl")}, "eval_fraction": 0.25}).counts[
            "validation"
        ]
        == 25
    )


def test_test_rows_of_their_own_leave_the_training_rows_alone(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(8))
    write(tmp_path / "held.jsonl", pairs(7))
    found = drawn(tmp_path, str(tmp_path / "held.jsonl"), eval={"path": str(tmp_path / "held.jsonl")})
    assert found.data == {"eval_fraction": 0.0}
    assert found.test == {"path": str(tmp_path / "held.jsonl")}


def test_columns_and_documents_are_kept(tmp_path: Path) -> None:
    table = "\n".join(["q,a", *(f"what is {i}?,{i}" for i in range(40))])
    (tmp_path / "rows.csv").write_text(table)
    columns = {"prompt": "{q} ->", "completion": "a"}
    spec = DataSpec.model_validate({"train": {"path": str(tmp_path / "rows.csv"), "columns": columns}})
    found = draw(spec, None, tmp_path / "csv")
    assert found.data["train"]["columns"] == columns
    assert json.loads(rows_of(found.test)[0]).keys() == {"q", "a"}


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(12))
    with pytest.raises(DataError, match="12 rows: too few"):
        drawn(tmp_path)


@pytest.mark.parametrize("changed", ["rows.jsonl", "held.jsonl"])
def test_rows_that_changed_are_refused(changed: str, tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    write(tmp_path / "held.jsonl", pairs(7))
    held = {"eval": {"path": str(tmp_path / "held.jsonl")}}
    drawn(tmp_path, **held)
    write(tmp_path / changed, pairs(41))
    with pytest.raises(RunDirError, match="not what the study"):
        drawn(tmp_path, **held, begun=True)


def test_rows_may_change_before_the_study_begins(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", pairs(40))
    drawn(tmp_path)
    of_old_rows = tmp_path / "tests/base"
    of_old_rows.mkdir(parents=True)
    drawn(tmp_path)
    assert of_old_rows.is_dir()
    write(tmp_path / "rows.jsonl", pairs(50))
    assert drawn(tmp_path).counts == {"train": 35, "validation": 5, "test": 10}
    assert not of_old_rows.is_dir()
    assert drawn(tmp_path, begun=True).counts == {"train": 35, "validation": 5, "test": 10}
