"""Imports that the garbage collector does not see."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, sys
from ftune.run.imports import import_libraries
import_libraries(peft=False)
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
assert "transformers.modeling_utils" in sys.modules and "peft" not in sys.modules
kept = gc.get_freeze_count()
made = [[] for _ in range(1_000)]
import_libraries(peft=True)
assert abs(gc.get_freeze_count() - kept) < 500 and "peft" not in sys.modules
"""


def test_what_is_imported_is_frozen_once_and_collection_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
