"""Cells of a page: code and links to files beside it, and nothing that runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftune.experiments.document import link, marked, table


def test_code_and_links_are_marked() -> None:
    assert marked("`x` in [a run](runs/a/run.json)") == '<code>x</code> in <a href="runs/a/run.json">a run</a>'
    assert marked("[b](#run-b)") == '<a href="#run-b">b</a>'


@pytest.mark.parametrize(
    "target", ["javascript:alert(1)", "https://host/x", "//host/x", "/etc/passwd", 'a" onclick="x', "data:text/html,x"]
)
def test_no_link_leaves_the_directory_by_a_scheme_a_host_or_the_root(target: str) -> None:
    assert "<a " not in marked(f"[x]({target})")


def test_code_is_no_link() -> None:
    assert "<a " not in marked("`[x](y)`")


def test_a_path_of_any_name_is_a_link(tmp_path: Path) -> None:
    made = link("x", tmp_path / "runs/my run #1 (é)/run.json", tmp_path / "out")
    assert marked(made) == '<a href="../runs/my%20run%20%231%20%28%C3%A9%29/run.json">x</a>'


def test_the_first_row_of_a_name_has_an_anchor() -> None:
    made = table("runs", (("method", "seed"), [["a", "1"], ["a", "2"], ["b", "1"]]), anchor="run-")
    assert made.count('id="run-a"') == made.count('id="run-b"') == 1
    assert made.count('<th scope="row">') == 3
    assert made.count('<th scope="col">') == 2
