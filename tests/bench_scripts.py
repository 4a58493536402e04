"""The modules of scripts/bench, which is no package: imported as when a script of it is run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

DIRECTORY = Path(__file__).parents[1] / "scripts/bench"
MODULES = tuple(path.stem for path in sorted(DIRECTORY.glob("*.py")))


@contextmanager
def imported(*names: str) -> Iterator[dict[str, ModuleType]]:
    """The modules by name, for as long as the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DIRECTORY))
        # Other tests may have imported directories of the same names.
        others = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
        yield {name: importlib.import_module(name) for name in names}
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(others)
