"""A base model on this disk is known by its files, wherever they lie."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from ftune.plan.fingerprint import MAX_SAMPLES, SAMPLE, fingerprint
from ftune.recipe.schema import ModelSpec

FILE = "model.safetensors"


def of(directory: Path) -> str:
    found = fingerprint(ModelSpec(id=str(directory)))
    assert found is not None
    return found


def test_a_copy_and_a_link_elsewhere_are_the_same(tmp_path: Path) -> None:
    directory = tiny.model_dir(tmp_path / "m")
    known = of(directory)
    assert of(Path(shutil.copytree(directory, tmp_path / "moved"))) == known
    (tmp_path / "link").symlink_to(directory)
    assert of(tmp_path / "link") == known


def test_each_tensor_counts(tmp_path: Path) -> None:
    directory = tiny.model_dir(tmp_path / "m")
    weights = load_file(directory / FILE)
    known = of(directory)
    for name in weights:
        other = weights | {name: weights[name] + 0.5}
        save_file(other, directory / FILE, {"format": "pt"})
        assert of(directory) != known, name
    save_file(weights, directory / FILE, {"format": "pt", "note": "saved again"})
    assert of(directory) == known


def configure(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "change",
    [
        lambda directory: configure(directory, rms_norm_eps=1e-3),
        lambda directory: (directory / "modeling_own.py").write_text("# code"),
        lambda directory: tiny.model().bfloat16().save_pretrained(directory),
        lambda directory: tiny.model(num_hidden_layers=1).save_pretrained(directory),
    ],
)
def test_what_changes_the_model_changes_it(change: Callable[[Path], Any], tmp_path: Path) -> None:
    directory = tiny.model_dir(tmp_path / "m")
    known = of(directory)
    change(directory)
    assert of(directory) != known


def test_what_does_not_change_the_model_leaves_it(tmp_path: Path) -> None:
    directory = tiny.model_dir(tmp_path / "m")
    known = of(directory)
    configure(directory, transformers_version="5.99.0", _name_or_path="/somewhere")
    (directory / "README.md").write_text("notes")
    (directory / FILE).touch()
    assert of(directory) == known


def test_several_files_and_a_gguf_file(tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    tiny.model().save_pretrained(sharded, max_shard_size="100KB")
    known = of(sharded)
    last = sorted(sharded.glob("model-*.safetensors"))[-1]
    save_file({name: tensor + 1 for name, tensor in load_file(last).items()}, last, {"format": "pt"})
    assert of(sharded) != known

    file = tmp_path / "m.gguf"
    file.write_bytes(bytes(range(256)) * 100)
    known = of(file)
    assert of(Path(shutil.copy(file, tmp_path / "moved.gguf"))) == known
    file.write_bytes(bytes(range(256)) * 99 + bytes(256))
    assert fingerprint(ModelSpec(id=str(file))) is not None
    file.write_bytes(bytes(range(256)) * 101)
    assert of(file) != known


def test_a_model_of_the_hub_has_none() -> None:
    assert fingerprint(ModelSpec(id="org/name")) is None


def test_16_gb_take_less_than_half_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny.model_dir(tmp_path / "m")
    tensors = {f"layers.{i}.weight": [8192, 4096] for i in range(240)}  # 64 MiB each in bfloat16: 15 GiB
    size, header = 8192 * 4096 * 2, {}
    for index, (name, shape) in enumerate(tensors.items()):
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [index * size, (index + 1) * size]}
    content = json.dumps(header).encode()
    with (directory / FILE).open("wb") as file:  # with holes: it takes no disk
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + len(tensors) * size)
    read: list[int] = []
    import os

    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *args: read.append(args[1]) or pread(*args))
    began = time.process_time()
    of(directory)
    assert time.process_time() - began < 0.5
    assert 240 <= len(read) <= MAX_SAMPLES
    assert sum(read) <= MAX_SAMPLES * SAMPLE
    assert torch.Size(tensors["layers.0.weight"]).numel() * 2 == size
