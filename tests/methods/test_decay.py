"""Weight decay reaches matrices, and no vector, however it is stored."""

from __future__ import annotations

import causal_models
import pytest
import tiny
import torch
import transformers
from torch import nn

from ftune.methods._decay import undecayed
from ftune.methods.optimizer import OptimizerSpec
from ftune.plan.shapes import build_on_meta

# What never decays, though it has more than one dimension; all else that has one or none does not decay either.
STACKED = {
    "gpt_oss": {"gate_up_proj_bias", "down_proj_bias"},
    "mamba2": set[str](),
    "qwen3_next": set[str](),
    "cohere2": set[str](),
}


@pytest.mark.parametrize("method", ["full", "galore"])
@pytest.mark.parametrize("architecture", STACKED)
def test_matrices_decay_and_nothing_else(architecture: str, method: str) -> None:
    kind, settings = causal_models.CONFIGS[architecture]
    common = {key: value for key, value in causal_models.SIZES.items() if architecture != "mamba2" or "token" in key}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**common, "num_hidden_layers": 2, "hidden_size": 64, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    optimizer = tiny.method(method).optimizer(
        tiny.method(method).adapt(model, tiny.context()), OptimizerSpec(weight_decay=0.1)
    )
    decays = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        stacked = name.rpartition(".")[2] in STACKED[architecture]
        assert decays[id(parameter)] == (parameter.ndim >= 2 and not stacked), name


def test_vectors_in_other_shapes_do_not_decay() -> None:
    class HeadNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 16))

    model = nn.Module()
    model.norm = HeadNorm()
    model.mix = nn.Parameter(torch.ones(1, 1, 8))
    model.A_log = nn.Parameter(torch.ones(8, 4))
    model.conv1d = nn.Conv1d(8, 8, 4, groups=8)
    model.lora_A = nn.Linear(8, 1, bias=False)  # a matrix of rank 1
    assert undecayed(model) == {"norm.weight", "mix", "A_log", "conv1d.bias"}


def test_cohere_s_norms_of_each_head_are_found() -> None:
    config = transformers.CohereConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, use_qk_norm=True
    )
    assert "model.layers.0.self_attn.q_norm.weight" in undecayed(build_on_meta(config))
