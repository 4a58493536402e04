"""Answers are read as they were written, whatever is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftune.errors import RunDirError
from ftune.experiments.answers import Answered, read_answers


def test_a_text_may_hold_what_elsewhere_parts_lines(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four\nfive\r\x0csix"
    line = {"row": 3, "prompt": text, "reference": "r", "tuned": {"answer": text, "scores": {"f1": 0.5}}}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_answers(tmp_path, "tuned") == {3: Answered(text, "r", text, {"f1": 0.5})}
    with pytest.raises(RunDirError, match="cannot be read"):
        read_answers(tmp_path, "base")
