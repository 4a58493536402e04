"""A base model that cannot be read is refused in a sentence of ftune's own, with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
from huggingface_hub import constants, errors
from test_gguf import write_gguf

from ftune.errors import ModelError
from ftune.installed import version_of
from ftune.plan import base_model
from ftune.plan.base_model import check_weights, load_config, load_tokenizer
from ftune.plan.shapes import build_on_meta
from ftune.plan.unreadable import explained
from ftune.recipe.schema import ModelSpec

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a whole model and a whole GGUF file are, to be copied and spoilt."""
    directory = tmp_path_factory.mktemp("whole")
    tiny.model_dir(directory / "model")
    write_gguf(directory / "tiny.gguf")
    return directory


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(whole / "model", tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    base_model._read_config.cache_clear()  # by the model's name, which is the same in each test
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def refused(spec: ModelSpec) -> ModelError:
    """The refusal by what the plan reads of a model, in its order."""
    with pytest.raises(ModelError) as error:
        read(spec)
    assert error.value.help
    assert "\n" not in error.value.message + error.value.help
    assert len(error.value.message) < 400
    return error.value


def read(spec: ModelSpec) -> None:
    build_on_meta(load_config(spec))
    check_weights(spec)
    load_tokenizer(spec)


def configure(**changes: Any) -> None:
    path = Path("m/config.json")
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "what", "help"),
    [
        ({"model_type": ...}, "has a config.json without `model_type`", "copy it again"),
        ({"model_type": 3}, "whose `model_type` is 3, not a name", "copy it again"),
        ({"model_type": ["llama"]}, "not a name", "copy it again"),
        ({"model_type": "lama"}, "is of type `lama`, which transformers", "did you mean `llama`?"),
        ({"model_type": "zork9"}, "is of type `zork9`, which transformers", "pip install -U transformers"),
        (
            {"model_type": "llama9", "transformers_version": "99.1.0.dev0"},
            "is of type `llama9`, which transformers",
            "`pip install 'transformers>=99.1.0'`: it was written by that version",
        ),
        ({"hidden_act": "zork", "transformers_version": "99.1.0"}, "`hidden_act: zork`", "copy it again"),
        ({"hidden_size": "64", "transformers_version": "99.1.0"}, "'hidden_size' expected int", "transformers>=99.1.0"),
        ({"transformers_version": [], "hidden_size": "64"}, "Field '", "copy it again"),
        ({"hidden_size": 0}, "`hidden_size` is 0", "copy it again"),
        ({"hidden_size": -64}, "`hidden_size` is -64", "copy it again"),
        ({"num_attention_heads": 7}, "(64) is not a multiple of the number of attention heads (7)", "copy it again"),
        ({"num_attention_heads": 0}, "`num_attention_heads` is 0", "copy it again"),
        ({"num_key_value_heads": 0}, "`num_key_value_heads` is 0", "copy it again"),
        ({"pad_token_id": 999}, "`pad_token_id` is no number below `vocab_size`", "copy it again"),
        ({"rope_scaling": {"type": "zork", "factor": 2}}, "transformers knows no `rope_type: zork`", "copy it again"),
        ({"dtype": "zork"}, "transformers knows no `dtype: zork`", "copy it again"),
        ({"quantization_config": 3}, "a value in it is not what it should be", "copy it again"),
        ({"layer_types": ["zork"]}, "The `layer_types` entries must be in", "copy it again"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}},
            "needs Python code that comes with the model",
            "write `model: {id: m, trust_remote_code: true}`",
        ),
    ],
)
def test_a_configuration_that_is_none(changes: dict[str, Any], what: str, help: str) -> None:
    configure(**changes)
    error = refused(ModelSpec(id="m"))
    assert what in error.message
    assert help in (error.help or "")
    if "which transformers" in what:
        assert f"which transformers {version_of('transformers')} does not know" in error.message


def test_a_model_s_own_code_that_was_not_copied() -> None:
    configure(model_type="own", auto_map={"AutoConfig": "configuration_own.Own"})
    error = refused(ModelSpec(id="m", trust_remote_code=True))
    assert error.message == "model `m` needs its own code, and `configuration_own.py` is not there"


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', POINTER, "<html>", "\0" * 9])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_damaged_file_is_named(file: str, content: str) -> None:
    Path("m", file).write_text(content)
    assert f"{file}`" in refused(ModelSpec(id="m")).message


@pytest.mark.parametrize(
    ("files", "what", "help"),
    [
        ({}, "has no tokenizer (tokenizer.json)", "copy tokenizer.json"),
        ({"tokenizer.model": "x"}, "its `tokenizer.model` cannot be read instead", "pip install sentencepiece"),
        ({"tokenizer.json": "{}"}, "has a tokenizer.json without `model`", "copy it again"),
        ({"tokenizer.json": '{"model": {}}'}, "cannot read the tokenizer", "copy the tokenizer's files again"),
    ],
)
def test_a_model_without_a_tokenizer(files: dict[str, str], what: str, help: str) -> None:
    Path("m/tokenizer.json").unlink()
    for name, content in files.items():
        Path("m", name).write_text(content)
    error = refused(ModelSpec(id="m"))
    assert what in error.message
    assert help in (error.help or "")


def test_a_chat_template_that_is_no_text() -> None:
    Path("m/chat_template.jinja").write_bytes(b"\xff\xfe")
    assert refused(ModelSpec(id="m")).message == "`chat_template.jinja` of model `m` is not UTF-8"


def test_a_model_without_weights() -> None:
    Path("m/model.safetensors").unlink()
    assert "has no model.safetensors beside its config.json" in refused(ModelSpec(id="m")).message


def of_architecture(name: str) -> bytes:
    path = Path("made.gguf")
    writer = gguf.GGUFWriter(path, name)
    writer.add_name("x")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("change", "what", "help"),
    [
        (lambda whole: whole[:200], "is a GGUF file that is damaged, or cut short at 200 bytes", "download"),
        (lambda whole: whole[: len(whole) // 2], "damaged, or cut short", "download"),
        (lambda whole: whole[:-1000], "damaged, or cut short", "download"),
        (lambda whole: whole[:4], "damaged, or cut short at 4 bytes", "download"),
        (lambda whole: b"", "is empty", "download"),
        (lambda whole: b"ggml" + bytes(99), "is no GGUF file", "download"),
        (lambda whole: whole[:4] + b"\1\0\0\0" + whole[8:], "is a GGUF file of version 1", "another file"),
        (lambda whole: b"<html>", "is a web page", "download"),
        (lambda whole: of_architecture("zork"), "of architecture `zork`, which transformers", "safetensors"),
        (lambda whole: of_architecture("llama"), "whose tokenizer transformers does not read", "safetensors"),
    ],
)
def test_a_gguf_file_that_cannot_be_read(change: Callable[[bytes], bytes], what: str, help: str, whole: Path) -> None:
    Path("x.gguf").write_bytes(change((whole / "tiny.gguf").read_bytes()))
    with pytest.raises(ModelError) as error:
        load_tokenizer(ModelSpec(id="x.gguf"))
    assert what in error.value.message
    assert error.value.message.count("x.gguf") == 1
    assert help in (error.value.help or "")


def raised_by(cause: type[Exception]) -> OSError:
    """As transformers wraps what the hub's library raises."""
    error = OSError("a long text\nof several lines")
    error.__cause__ = cause.__new__(cause)
    return error


@pytest.mark.parametrize(
    ("cause", "what", "help"),
    [
        (errors.GatedRepoError, "is gated", "https://huggingface.co/org/x, and `hf auth login`"),
        (errors.RepositoryNotFoundError, "`org/x` is no model of the hub, and no directory here", "correct the id"),
        (errors.RevisionNotFoundError, "has no revision `v2`", "a branch, a tag or a commit"),
        (errors.LocalEntryNotFoundError, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"),
        (errors.HfHubHTTPError, "cannot read the tokenizer of model `org/x`: a long text", "try again later"),
    ],
)
def test_what_the_hub_does_not_give(cause: type[Exception], what: str, help: str) -> None:
    with pytest.raises(ModelError) as error, explained(ModelSpec(id="org/x", revision="v2"), "tokenizer"):
        raise raised_by(cause)
    assert what in error.value.message
    assert help in (error.value.help or "")
    assert "\n" not in error.value.message


@pytest.mark.parametrize(("id", "near"), [("mnie", "mine"), ("modles/llama", "models/llama")])
def test_a_directory_is_suggested_for_what_the_hub_does_not_have(id: str, near: str) -> None:
    Path("models/llama").mkdir(parents=True)
    Path("mine").mkdir()
    error = refused(ModelSpec(id=id))
    assert "there is no directory of this name" in error.message
    assert f"did you mean the directory `{near}`?" in (error.help or "")


def test_a_file_that_the_repository_does_not_have() -> None:
    for spec, what in (
        (ModelSpec(id="org/x"), "model `org/x` has no config.json"),
        (ModelSpec(id="org/x", gguf_file="q.gguf"), "model `org/x` has no file `q.gguf`"),
    ):
        with pytest.raises(ModelError) as error, explained(spec, "configuration"):
            raise OSError("org/x does not appear to have a file named ...")
        assert error.value.message == what
        assert "gguf_file" in (error.value.help or "")


def test_a_defect_keeps_its_traceback() -> None:
    for spec, part in ((ModelSpec(id="m"), "weights"), (ModelSpec(id="m", trust_remote_code=True), "configuration")):
        with pytest.raises(ZeroDivisionError), explained(spec, part):
            1 / 0  # noqa: B018
