"""What is named as a base model and is none is told as what it is, with what to write instead."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from ftune.errors import ModelError
from ftune.recipe.locate import locate_model
from ftune.recipe.no_model import damage, other_weights
from ftune.recipe.schema import ModelSpec

ADAPTER = '{"base_model_name_or_path": "org/base"}'
COMMIT = "a" * 40
CACHED = f"models--org--name/snapshots/{COMMIT}"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(files: dict[str, str]) -> None:
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            Path(name).mkdir()
        else:
            Path(name).write_text(content)


@pytest.mark.parametrize(
    ("files", "id", "what", "help"),
    [
        ("x/", "x", "is an empty directory", "hub id"),
        ("x/README.md", "x", "has no config.json", "name a directory that has one"),
        ("x/model.safetensors", "x", "holds weights and no config.json", "copy config.json"),
        ("x/pytorch_model.bin", "x", "holds weights as a pickle, and no config.json", "safetensors"),
        ("x/tokenizer.json", "x", "holds a tokenizer and no model", "config.json"),
        ("x/model_index.json x/text_encoder/config.json", "x", "is a pipeline of diffusers", "ForCausalLM"),
        ("x/modules.json x/0_Transformer/config.json", "x", "is a model of sentence-transformers", "ForCausalLM"),
        ("x/params.json x/consolidated.00.pth", "x", "is an original checkpoint", "transformers' form"),
        ("x/params.json x/consolidated.safetensors", "x", "is an original checkpoint", "transformers' form"),
        ("x/config.json x/original/params.json", "x/original", "is an original checkpoint", "write `model: x`"),
        ("x/config.json x/onnx/model.onnx", "x/onnx", "has no config.json", "write `model: x`"),
        ("x/zero_to_fp32.py x/global_step5/a.pt", "x", "is a checkpoint of DeepSpeed", "zero_to_fp32.py"),
        ("x/__0_0.distcp", "x", "is a checkpoint of FSDP", "merge-weights"),
        ("x/a.gguf", "x", "holds a GGUF file", "write `model: {id: x, gguf_file: a.gguf}`"),
        ("x/a.gguf x/b.gguf", "x", "holds 2 GGUF files: `a.gguf`, `b.gguf`", "gguf_file: b.gguf}`: the largest"),
        ("x/a-00001-of-00002.gguf x/a-00002-of-00002.gguf", "x", "holds a GGUF file in parts", "--merge"),
        (f"{CACHED}/config.json", "models--org--name", "is a directory of the hub's cache", f"`model: {CACHED}`"),
        (f"hub/{CACHED}/config.json", "hub", "is a directory of the hub's cache", f"`model: hub/{CACHED}`"),
        (f"{CACHED}/config.json", "models--org--name/snapshots", "above the model", f"write `model: {CACHED}`"),
        ("x/checkpoint-5/config.json", "x", "above the model", "write `model: x/checkpoint-5`"),
        ("x/a/config.json x/b/config.json", "x", "above the model", "one of `model: x/a`, `model: x/b`"),
        ("x/adapter_config.json", "x", "is an adapter of `org/base`, not a model", "write `model: org/base`"),
        ("x/adapter_config.json x/config.json", "x", "beside a model", "merge"),
        ("r/run.json r/adapter/adapter_config.json", "r", "is a run of ftune", "`ftune merge r`"),
        ("r/run.json r/adapter/adapter_config.json", "r/adapter", "is an adapter of `org/base`", "`ftune merge r`"),
        ("r/run.json r/adapter/a r/merged/config.json", "r", "is a run of ftune", "write `model: r/merged`"),
        ("r/run.json r/model/config.json", "r", "is a run of ftune", "write `model: r/model`"),
        ("r/run.json r/checkpoints/step-5/a", "r", "is a run of ftune", "no result yet"),
        (
            "r/run.json r/model/config.json r/checkpoints/step-5/a",
            "r/checkpoints/step-5",
            "a part of",
            "`model: r/model`",
        ),
        ("x/config.json x/pytorch_model.bin", "x", "in a pickle, `pytorch_model.bin`", "safetensors"),
        ("x/config.json", "x/config.json", "is a file, and a model is a directory", "write `model: x`"),
        ("x/config.json x/model.safetensors", "x/model.safetensors", "a model is a directory", "write `model: x`"),
        ("x/adapter_config.json x/a.safetensors", "x/a.safetensors", "is a file of an adapter", "`model: org/base`"),
        ("x/model.safetensors", "x/model.safetensors", "holds weights alone", "copy config.json"),
        ("x/model.pth", "x/model.pth", "is a pickle", "safetensors"),
        ("x/model.tar.gz", "x/model.tar.gz", "is an archive", "unpack"),
        ("blobs/sha256-5", "blobs/sha256-5", "is a GGUF file", "ln -s blobs/sha256-5 model.gguf"),
    ],
)
def test_what_is_no_model_is_told_as_what_it_is(files: str, id: str, what: str, help: str) -> None:
    contents = {"adapter_config.json": ADAPTER, "b.gguf": "larger", "sha256-5": "GGUF"}
    write({file: contents.get(Path(file).name, "") for file in files.split()})
    with pytest.raises(ModelError) as refused:
        locate_model(ModelSpec(id=id))
    assert what in refused.value.message
    assert refused.value.message.startswith(f"`{id}` ")
    assert help in (refused.value.help or "")
    assert "\n" not in refused.value.render().replace("\n  help:", "")


@pytest.mark.parametrize("id", ["r", "r/adapter"])
def test_a_run_whose_method_cannot_be_merged(id: str) -> None:
    record = {"resolved": {"method": {"name": "prefix"}, "model": {"id": "org/base"}}}
    write({"r/run.json": json.dumps(record), "r/adapter/adapter_config.json": ADAPTER})
    with pytest.raises(ModelError) as refused:
        locate_model(ModelSpec(id=id))
    assert refused.value.help == "what `prefix` trains cannot be merged into a model: write its base, `model: org/base`"


def test_links_that_lead_nowhere_are_told() -> None:
    Path("x").mkdir()
    Path("x/config.json").symlink_to("../../blobs/5")
    with pytest.raises(ModelError, match=r"holds links to files that are not there \(`config.json`\)"):
        locate_model(ModelSpec(id="x"))
    Path("x/config.json").unlink()
    Path("x/model.safetensors").symlink_to("../blobs/6")
    told = other_weights(Path("x"))
    assert told is not None
    assert "(`model.safetensors`)" in told[0]


@pytest.mark.parametrize(
    "files",
    [
        "",
        "x/model.safetensors x/pytorch_model.bin",
        "x/model.safetensors.index.json x/a.gguf",
        "x/training_args.bin",
        "x/a.gguf",
    ],
)
def test_a_model_of_transformers_is_taken(files: str) -> None:
    write({file: "" for file in ["x/config.json", *files.split()]})
    assert locate_model(ModelSpec(id="x")).kind == "directory"


@pytest.mark.parametrize(
    ("file", "what", "help"),
    [
        ("tf_model.h5", "in a file of TensorFlow, `tf_model.h5`", "safetensors"),
        ("flax_model.msgpack", "in a file of Flax", "safetensors"),
        ("onnx/model.onnx", "in an ONNX file, `onnx/model.onnx`", "safetensors"),
        ("weights.npz", "in a file of NumPy", "safetensors"),
        ("model.pth", "in a pickle", "safetensors"),
        ("a.gguf", "holds a GGUF file", "gguf_file: a.gguf"),
        ("model.bin model.safetensors", None, ""),
        ("training_args.bin optimizer.pt", None, ""),
    ],
)
def test_weights_of_another_kind(file: str, what: str | None, help: str) -> None:
    write({f"x/{name}": "" for name in file.split()})
    told = other_weights(Path("x"))
    assert told is None if what is None else told is not None and what in told[0] and help in told[1]


HEADER = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
SAFETENSORS = struct.pack("<Q", len(HEADER)) + HEADER + b"\1" * 8


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("model.safetensors", b"", "is empty"),
        ("model.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of Git LFS"),
        ("tokenizer.json", b"\n<!DOCTYPE html>", "is a web page"),
        ("config.json", bytes(99), "holds zeros"),
        ("model.safetensors", b'{"error": "denied"}', 'is a text (`{"error": "denied"}`)'),
        ("model.safetensors", b"PK\3\4" + bytes(99), "is a pickle of torch, or a zip archive"),
        ("model.safetensors", b"\xff" * 99, "is no safetensors file"),
        ("model.safetensors", SAFETENSORS[:-1], "is cut short: 76 bytes of at least 77"),
        ("model.safetensors", SAFETENSORS[:30], "is cut short: 30 bytes of at least 69"),
        ("config.json", b'{\n"a" 5}', "is damaged at line 2, column 5"),
        ("config.json", b'{"a": "\xe9"}', "is not UTF-8"),
        ("config.json", b"[" * 100_000, "is nested too deep"),
        ("config.json", b"[1]", "holds no JSON object"),
        ("config.json", b"{}", None),
        ("model.safetensors", SAFETENSORS, None),
        ("model.gguf", b"GGUF\3\0", None),
    ],
)
def test_what_a_file_holds_instead(name: str, content: bytes, what: str | None) -> None:
    Path(name).write_bytes(content)
    told = damage(Path(name))
    assert told is None if what is None else told is not None and told[0].startswith(what)
