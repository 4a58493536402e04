"""Kill -9 at seeded moments and before seeded file operations; each resumed run ends as the untouched one, bit for bit.

``scripts/chaos/kill.py`` is the long version, over more methods.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

KILL = Path(__file__).parents[2] / "scripts/chaos/kill.py"


@pytest.mark.slow
def test_killed_runs_end_as_the_untouched_one() -> None:
    command = [sys.executable, str(KILL), "--methods", "lora", "--steps", "8", "--kills", "6", "--seed", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, operations = re.findall(r"(\d+) kills, .* (\d+) file operations in one, .*: all equal", done.stdout)[0]
    assert int(kills) >= 6
    # A count of nothing would mean that no operation was watched, and that only the clock killed.
    assert int(operations) > 30
