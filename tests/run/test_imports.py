"""Imports that the garbage collector does not see."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer

from ftune.cli import app
from ftune.errors import FtuneError
from ftune.run import imports

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


LATER = """
import sys, torch
from ftune.run.imports import import_libraries
compile_now = torch.compile
import_libraries(peft=True)
assert torch.compile is compile_now
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler was imported"
from bitsandbytes.backends.default import ops  # decorates functions with torch.compile as it is imported
code = torch.linspace(-1, 1, 16)
places = torch.tensor([0, 15, 3, 4], dtype=torch.uint8)
found = ops._dequantize_blockwise_compute(places, torch.ones(2), code, 2, code.dtype)
assert torch.allclose(found.flatten(), code[[0, 15, 3, 4]]), found
"""


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_the_compiler_is_not_imported_before_something_is_compiled() -> None:
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["eval", "merge", "chat"])
def test_commands_on_a_run_import_so_too_but_not_to_say_that_there_is_none(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(imports, "import_libraries", lambda *, peft: calls.append(peft))
    arguments = ["--prompt", "Hi."] if command == "chat" else []
    for target in (tmp_path, tmp_path / "none"):
        with pytest.raises(FtuneError):  # an empty directory is no run either
            typer.main.get_command(app).main([command, str(target), *arguments], standalone_mode=False)
    assert calls == [True]
