"""What `full` and `galore` save is read back as transformers reads it, whatever form it keeps the weights in."""

from __future__ import annotations

from pathlib import Path

import causal_models
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.tuned import load_plain, load_tuned
from ftune.errors import ModelError
from ftune.plan.resolve import resolve

STORED_AS = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.0.w1.weight",  # experts one by one, a router elsewhere
    "qwen3_moe": "model.layers.0.mlp.experts.3.down_proj.weight",
    "gpt_neox": "embed_out.weight",  # a head under another name
}
"""A tensor of the files that is no parameter of the model."""


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(60)[None] * 37 % 200, use_cache=False).logits
    return found


@pytest.mark.parametrize("method", ["full", "galore"])
@pytest.mark.parametrize("architecture", STORED_AS)
def test_a_model_that_is_stored_in_another_form_is_read_back(architecture: str, method: str, tmp_path: Path) -> None:
    base = causal_models.make(architecture, tmp_path / "model")
    run = causal_models.run(causal_models.recipe(base, method, tmp_path))
    with safe_open(run.root / "model/model.safetensors", framework="pt") as opened:
        assert STORED_AS[architecture] in opened.keys()  # noqa: SIM118
    merge(run, out=tmp_path / "shards", dtype="float32", by_shard=True)
    whole, parts = (causal_models.read_plainly(place) for place in (run.root / "merged", tmp_path / "shards"))
    assert torch.equal(logits(whole), logits(parts))


def test_what_is_no_longer_the_trained_model_is_refused_by_name(tmp_path: Path) -> None:
    base = causal_models.make("qwen3_moe", tmp_path / "model")
    loaded = causal_models.recipe(base, "full", tmp_path)
    run = causal_models.run(loaded)
    plan, file = resolve(loaded.recipe), run.root / "model/model.safetensors"
    stored = load_file(file)
    # As in runs of older versions: a digest of the file would answer first.
    run.write(run.read() | {"artifact_sha256": {}})

    def refused(tensors: dict[str, torch.Tensor]) -> str:
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match="does not hold the weights of this model") as error:
            load_tuned(load_plain(plan), plan, RunDir(run.root))
        assert error.value.help
        return str(error.value)

    norm = "model.norm.weight"
    assert norm in refused({name: tensor for name, tensor in stored.items() if name != norm})
    assert "stranger" in refused(stored | {"stranger": torch.zeros(2)})
    assert norm in refused(stored | {norm: torch.zeros(3)})
    file.write_bytes(b"damaged")
    with pytest.raises(ModelError, match="cannot read the model in") as error:
        load_tuned(load_plain(plan), plan, RunDir(run.root))
    assert error.value.help
