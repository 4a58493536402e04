"""A base model on this disk is known by its files, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
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


def made(directory: Path, sizes: dict[str, int], changed: str | None = None) -> Path:
    """A model of tensors of so many bytes, each of its own content; one changed in every byte."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    header, data = {}, bytearray()
    for index, (name, size) in enumerate(sizes.items()):
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
        data += bytes((index + place + (name == changed)) % 251 for place in range(size))
    content = json.dumps(header).encode()
    (directory / FILE).write_bytes(len(content).to_bytes(8, "little") + content + data)
    return directory


@pytest.fixture
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits at which a few kilobytes are a large model."""
    for name, value in {"SAMPLE": 16, "STRIDE": 64, "MAX_SAMPLES": 64}.items():
        monkeypatch.setattr(f"ftune.plan.fingerprint.{name}", value)


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize(
    ("sizes", "known"),
    [
        (
            {"a": 1000, "b": 10, "c": 0, "d": 65, "e": 64, "f": 63},
            "13f536771d752500294b0dc9377c32bf4893b3c09a8de8d961b0496d7e27423e",
        ),
        (
            {f"layers.{i}.weight": i * 7 for i in range(30)},
            "31054d34d09899e0fd3134be4d72acceff550cda89d4ecfa9f674d03af8ae854",
        ),
        (
            {f"layers.{i}.weight": 20 for i in range(64)},
            "fa7a51b9e2f3a82a20aba812678de79bb938a5caeeb6e7eb6f04afb7b107d191",
        ),
        ({"whole": 64 * 64 - 1}, "89a0b560a0522d0c3c4613b440accfcb7406ec2125fac57c6beb2f1551838650"),
    ],
    ids=["several sizes", "layers", "as many as are sampled", "as large as is sampled"],
)
def test_bases_of_runs_that_have_begun_stay_known(sizes: dict[str, int], known: str, tmp_path: Path) -> None:
    assert of(made(tmp_path / "m", sizes)) == known


KINDS = ("q", "k", "v", "o", "gate", "up", "down", "norm")


@pytest.mark.usefixtures("fewer")
@pytest.mark.parametrize("layers", [2, 5, 8])
def test_each_tensor_of_a_large_base_counts(layers: int, tmp_path: Path) -> None:
    sizes = {f"layers.{i}.{kind}": 30 if kind == "norm" else 1000 for i in range(layers) for kind in KINDS}
    known = of(made(tmp_path / "m", sizes))
    unseen = [name for name in sizes if of(made(tmp_path / "m", sizes, changed=name)) == known]
    assert not unseen


@pytest.mark.usefixtures("fewer")
def test_of_more_tensors_than_samples_each_kind_counts(tmp_path: Path) -> None:
    sizes = {f"layers.{i}.{kind}": 100 for i in range(16) for kind in KINDS}
    known = of(made(tmp_path / "m", sizes))
    seen = [name for name in sizes if of(made(tmp_path / "m", sizes, changed=name)) != known]
    assert len(seen) == 64
    assert {name.rpartition(".")[2] for name in seen} == set(KINDS)
    backwards = dict(reversed(sizes.items()))
    known = of(made(tmp_path / "m", backwards))
    assert [name for name in sizes if of(made(tmp_path / "m", backwards, changed=name)) != known] == seen


@pytest.mark.parametrize("layers", [240, 1100])
def test_many_gb_take_less_than_half_a_second(layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny.model_dir(tmp_path / "m")
    size, header = 8192 * 4096 * 2, {}  # 64 MiB each in bfloat16: 15 GiB, and 69
    for index in range(layers):
        offsets = [index * size, (index + 1) * size]
        header[f"layers.{index}.weight"] = {"dtype": "BF16", "shape": [8192, 4096], "data_offsets": offsets}
    content = json.dumps(header).encode()
    with (directory / FILE).open("wb") as file:  # with holes: it takes no disk
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + layers * size)
    read: list[int] = []
    sha256 = hashlib.sha256

    def counted(data: bytes = b"") -> Any:
        digest = sha256(data)
        return SimpleNamespace(
            update=lambda part: (read.append(len(part)), digest.update(part)),
            digest=digest.digest,
            hexdigest=digest.hexdigest,
        )

    monkeypatch.setattr("ftune.plan.fingerprint.hashlib.sha256", counted)
    began = time.process_time()
    of(directory)
    assert time.process_time() - began < 0.5
    samples = [length for length in read if length == SAMPLE]
    assert max(layers, MAX_SAMPLES // 2) <= len(samples) <= MAX_SAMPLES
    assert len(read) <= len(samples) + 2  # and the configuration and the header
