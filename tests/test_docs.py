"""Generated pages are those of this version."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import causal_models
import pytest

from ftune.data.formats import EXPECTED, Plain, convert
from ftune.data.read import read_source
from ftune.methods import METHODS
from ftune.recipe import parse_recipe
from ftune.recipe.schema import DataSource, Recipe

ROOT = Path(__file__).parents[1]


def test_links_lead_to_files_and_headings() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    pages = [page for page in pages if "studies" not in page.parts]  # reports, whose runs are not kept
    broken = []
    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            if not target.exists() or (anchor and anchor not in headings(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert not broken


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_page_on_methods_is_the_one_of_this_version() -> None:
    script = runpy.run_path(str(ROOT / "scripts/make_method_docs.py"))
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    assert page == script["render"](), "run `make docs`"
    for name in METHODS:
        assert f"### {name}\n" in page


def test_the_reference_of_the_recipe_is_the_one_of_this_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = runpy.run_path(str(ROOT / "scripts/make_recipe_docs.py"))
    page = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    assert page == script["render"](), "run `make docs`"
    for name in Recipe.model_fields:
        assert f"\n## {name}\n" in page or f"\n| `{name}` |" in page


def test_the_readme_is_short_and_has_the_measured_figures_of_every_method() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 130
    figures = json.loads((ROOT / "docs/figures/methods.json").read_text(encoding="utf-8"))["rows"]
    for name, method in METHODS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", readme, re.MULTILINE)
        merges = "yes" if method.mergeable else "no"
        assert row.endswith(f"| {figures[name]['trainable']:,} | {figures[name]['peak_ratio']:.2f} | {merges} |")


def test_every_row_on_the_page_on_data_is_of_its_format(tmp_path: Path) -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\*\*(\w+)\*\*:[^`]*(?:`[^`]+`[^`]*)*?\n```json\n(.+)\n```", page, re.MULTILINE)
    assert [name for name, _ in rows] == list(EXPECTED)
    for name, row in rows:
        (tmp_path / f"{name}.jsonl").write_text(row + "\n")
        read, format = read_source(DataSource(path=str(tmp_path / f"{name}.jsonl")))
        assert format == name
        assert len(convert(read, format, chat_template=True)) == 1


def test_the_errors_of_the_page_on_errors_are_raised() -> None:
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    texts = [row.partition(" `...`")[0] for row in rows if row != "text"]
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "ftune").rglob("*.py"))
    assert len(texts) > 40
    assert not [text for text in texts if text not in source]


def test_the_page_on_architecture_has_every_room() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "ftune").iterdir() if path.is_dir() and path.name != "__pycache__"}
    named = set(re.findall(r"^\| `(\w+)/?` \|", page, re.MULTILINE))
    assert named - {"cli"} == rooms - {"cli"}


def test_the_columns_on_the_page_on_data_are_read_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/data.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    monkeypatch.chdir(tmp_path)
    for name in ("tickets.csv", "held-out.csv"):
        Path(name).write_text("id,body,team\n1,No mail,007\n")
    text = f"model: org/tiny\nmethod: lora\n{block[1]}output_dir: runs/x\n"
    spec = parse_recipe(text, "r.yaml").recipe.data
    assert spec.eval is not None
    for rows, format in (read_source(spec.train), read_source(spec.eval, "eval", like=spec.train)):
        assert convert(rows, format, chat_template=True) == [Plain("Ticket: No mail\nTeam:", " 007", 0)]


def test_the_page_on_architectures_has_them_all() -> None:
    page = (ROOT / "docs/architectures.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].strip() for row in rows] == [*causal_models.CONFIGS, *causal_models.VISION]
    assert not [row for row in rows if "fails" in row], "run `make architectures`"
