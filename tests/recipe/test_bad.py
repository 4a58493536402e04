"""Golden tests: every kind of bad recipe, and the report it gets, side by side in bad/.

Leading comments direct the test: ``# --set key=value`` is an override, ``# without NAME`` hides a package.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ftune.errors import RecipeError
from ftune.recipe import checks, load_checked

BAD = Path(__file__).parent / "bad"
NAMES = sorted(path.stem for path in BAD.glob("*.yaml"))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a little of everything that a recipe can name, as the working directory."""
    for file in (
        "data/train.jsonl",
        "data/eval.jsonl",
        "data/notes.docx",
        "models/tiny/config.json",
        "models/ggufs/tiny.Q4.gguf",
        "templates/chat.jinja",
        "packages/tiny_models/__init__.py",
        "packages/tiny_models/tiny.Q4_1.gguf",
        "packages/secret.gguf",
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for directory in ("empty", "models/empty"):
        (tmp_path / directory).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def directives(path: Path) -> tuple[list[str], set[str]]:
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    options = [line.removeprefix("# --set ") for line in lines if line.startswith("# --set ")]
    hidden = {line.removeprefix("# without ") for line in lines if line.startswith("# without ")}
    return options, hidden


@pytest.mark.parametrize("name", NAMES)
def test_report(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[Path, str], None]
) -> None:
    options, hidden = directives(BAD / f"{name}.yaml")
    monkeypatch.setattr(checks, "is_installed", lambda package: package not in hidden)
    shutil.copy(BAD / f"{name}.yaml", workplace)
    with pytest.raises(RecipeError) as caught:
        load_checked(Path(f"{name}.yaml"), options)
    report = caught.value.render()
    assert report.startswith("error: ")
    assert str(workplace) not in report
    golden(BAD / f"{name}.txt", report + "\n")


def test_every_golden_has_its_recipe() -> None:
    assert sorted(path.stem for path in BAD.glob("*.txt")) == NAMES
    assert len(NAMES) >= 40


def test_a_package_is_not_imported_to_find_its_file(workplace: Path) -> None:
    import sys

    package = workplace / "packages/tiny_models/__init__.py"
    package.write_text("raise RuntimeError('imported')")
    Path("r.yaml").write_text(
        "model: package://tiny_models/tiny.Q4_1.gguf\nmethod: lora\ndata: data\noutput_dir: runs/x\n"
    )
    load_checked(Path("r.yaml"))
    assert "tiny_models" not in sys.modules
