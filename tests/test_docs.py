"""Generated pages are those of this version."""

from __future__ import annotations

import runpy
from pathlib import Path

from ftune.methods import METHODS

ROOT = Path(__file__).parents[1]


def test_the_page_on_methods_is_the_one_of_this_version() -> None:
    script = runpy.run_path(str(ROOT / "scripts/make_method_docs.py"))
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert page == script["render"](), "run `make docs`"
    for name in METHODS:
        assert f"### {name}\n" in page
