"""Merging without ever holding the model: the same files as in memory, or a refusal, or nothing at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from ftune.artifacts import by_shard
from ftune.artifacts import merge as merging
from ftune.artifacts.by_shard import merge_by_shard
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import Target
from ftune.errors import DataError, FtuneError, ModelError, RunFailed
from ftune.methods.lora import Lora


def run_of(where: Path, name: str = "lora", **blocks: Any) -> RunDir:
    train(tiny.recipe(where, name, **blocks))
    return RunDir(where / "run")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


def same_files(one: Path, other: Path) -> bool:
    """Whether two directories hold the same model: tensors, and what stands beside them."""
    ours, theirs = tensors(one), tensors(other)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    names = {path.name for path in one.iterdir()} - {"merge.json"}
    assert names == {path.name for path in other.iterdir()} - {"merge.json"}
    for file in names - {"model.safetensors"}:
        assert (one / file).read_text() == (other / file).read_text(), file
    return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_directory_is_the_one_that_merging_in_memory_writes(dtype: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, training={"max_steps": 12})
    merge(run, tmp_path / "whole", dtype)
    report = merge(run, tmp_path / "parts", dtype, by_shard=True)
    assert same_files(tmp_path / "parts", tmp_path / "whole")
    assert json.loads((tmp_path / "parts/merge.json").read_text()) == report
    assert report["layers_compared"] == 14
    assert report["merge_error"] < 1e-5
    assert report["written_vs_adapter"]["overall"] < report["base_vs_adapter"]["overall"]


@pytest.mark.parametrize("name", ["lora", "longlora", "full"])
def test_tied_embeddings_are_written_once(name: str, tmp_path: Path) -> None:
    tiny.model_dir(tmp_path / "base", tie_word_embeddings=True)
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    tiny.write_chats(tmp_path / "eval.jsonl", 6, start=100)
    run = run_of(tmp_path, name)
    merge(run, tmp_path / "whole")
    merge(run, tmp_path / "parts", by_shard=True)
    assert same_files(tmp_path / "parts", tmp_path / "whole")


def test_biases_are_scaled_with_their_weights(tmp_path: Path) -> None:
    settings = tiny.config().to_dict()
    settings.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**settings), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # biases start at zero
    model.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    tiny.write_chats(tmp_path / "eval.jsonl", 6, start=100)
    run = run_of(tmp_path, "ia3")
    merge(run, tmp_path / "whole")
    # Each tensor in a file of its own, so that no bias is beside its weight.
    merge_by_shard(Target(run.recipe(), run), tmp_path / "parts", None, shard_bytes=1)
    ours, theirs = tensors(tmp_path / "parts"), tensors(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    base = tensors(tmp_path / "base")
    assert not torch.equal(ours["model.layers.0.self_attn.k_proj.bias"], base["model.layers.0.self_attn.k_proj.bias"])
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "parts")).dtype == torch.float32


def test_it_is_chosen_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    assert "by_shard" not in merge(run)
    monkeypatch.setattr(merging, "available_bytes", lambda device: merging.RUNTIME_BYTES)
    assert merge(run)["by_shard"]
    assert "by_shard" not in merge(run, by_shard=False)


def test_it_is_chosen_where_the_run_s_data_are_gone(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    assert merge(run)["by_shard"]
    with pytest.raises(DataError, match="there is no data file"):
        merge(run, by_shard=False)


def test_a_base_whose_files_name_other_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    # Which is told first where the run knows its base's fingerprint.
    monkeypatch.setattr("ftune.artifacts.merge.require_same_base", lambda run, recipe: None)
    file = tmp_path / "base/model.safetensors"
    stored = load_file(file)
    fused = {key.replace("q_proj", "qkv_proj"): value for key, value in stored.items()}
    save_file(fused, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="qkv_proj") as refused:
        merge(run, by_shard=True)
    assert "config.json" in str(refused.value.help)
    stored.pop("model.norm.weight")
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"it has no `model\.norm\.weight`"):
        merge(run, by_shard=True)
    file.unlink()
    with pytest.raises(ModelError, match="no weights in safetensors"):
        merge(run, by_shard=True)
    assert not (run.root / "merged").exists()


def test_a_layer_that_is_not_the_trained_one_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Lora, "merge_layer", lambda self, model, name, weights: weights)
        with pytest.raises(RunFailed, match="not those that were trained"):
            merge(run, by_shard=True)
    write = by_shard.write_shards

    def damaged(out: Path, *arguments: Any) -> dict[str, str]:
        digests = write(out, *arguments)
        file = out / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
        return digests

    with monkeypatch.context() as patch:
        patch.setattr(by_shard, "write_shards", damaged)
        with pytest.raises(RunFailed, match="reads back from the disk differently"):
            merge(run, by_shard=True)
    assert not (run.root / "merged").exists()


def test_rounding_that_undoes_the_training_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, optimizer={"learning_rate": 1e-6})
    with pytest.raises(RunFailed, match="no closer to the tuned ones"):
        merge(run, dtype="bfloat16", by_shard=True)


def test_a_disk_without_room_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    run = run_of(tmp_path)
    monkeypatch.setattr(by_shard.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(FtuneError, match=r"has 0\.977 KiB left"):
        merge(run, by_shard=True)


def test_tensors_that_the_model_does_not_use_are_left_out(tmp_path: Path) -> None:
    tiny.recipe(tmp_path)
    file = tmp_path / "base/model.safetensors"
    save_file(
        load_file(file) | {"model.layers.2.mlp.up_proj.weight": torch.ones(3, 3)}, file, metadata={"format": "pt"}
    )
    report = merge(run_of(tmp_path), by_shard=True)
    assert report["tensors"] == 21


def test_a_tied_tensor_may_be_stored_under_its_second_name_alone(tmp_path: Path) -> None:
    tiny.model_dir(tmp_path / "base", tie_word_embeddings=True)
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    tiny.write_chats(tmp_path / "eval.jsonl", 6, start=100)
    file = tmp_path / "base/model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, file, metadata={"format": "pt"})
    assert merge(run_of(tmp_path), by_shard=True)["tensors"] == 20


def test_tied_tensors_that_differ_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftune.artifacts.merge.require_same_base", lambda run, recipe: None)
    tiny.model_dir(tmp_path / "base", tie_word_embeddings=True)
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    tiny.write_chats(tmp_path / "eval.jsonl", 6, start=100)
    run = run_of(tmp_path)
    file = tmp_path / "base/model.safetensors"
    stored = load_file(file)
    save_file(stored | {"lm_head.weight": stored["model.embed_tokens.weight"] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(FtuneError, match="differ in its files"):
        merge(run, by_shard=True)
