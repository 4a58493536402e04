"""Recipes load without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "gguf", "numpy")

SCRIPT = f"""
import sys, time
import ftune.methods, ftune.recipe
from pathlib import Path
loaded, warnings = ftune.recipe.load_checked(Path("r.yaml"), ["training.max_steps=3"])
assert loaded.recipe.training.max_steps == 3
ftune.recipe.json_schema()
print(sorted(set({HEAVY!r}) & set(sys.modules)), time.process_time() < 2)
"""


def test_load_and_check_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    (tmp_path / "r.yaml").write_text("model: org/tiny\nmethod: qlora\ndata: data.jsonl\noutput_dir: runs/x\n")
    import ftune

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(ftune.__file__).parent.parent), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "[] True\n"
