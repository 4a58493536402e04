from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, DENSE, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, T5Config
from transformers.pytorch_utils import Conv1D

from ftune.errors import ModelError
from ftune.methods import METHODS, Context, Method
from ftune.plan.shapes import read_shape, shape_of

SHAPES = Path(__file__).parents[2] / "ftune" / "shapes"


def built(architecture: str, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_config(tiny_config(architecture, **changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sizes_equal_those_of_the_built_model(architecture: str) -> None:
    config = tiny_config(architecture)
    shape = read_shape(config)
    model = AutoModelForCausalLM.from_config(config)

    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.model_type == architecture
    assert shape.embedding == model.get_input_embeddings().weight.numel() == shape.vocab * shape.hidden
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert shape.head == (0 if tied else model.get_output_embeddings().weight.numel())
    assert shape.norms == sum(p.numel() for name, p in model.named_parameters() if "norm" in name or ".ln_" in name)
    assert (shape.hidden, shape.layers, shape.heads) == (64, 3, 4)
    assert shape.intermediate == (256 if architecture == "gpt2" else 96)
    found = {linear.name: (linear.in_features, linear.out_features) for linear in shape.linears}
    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            assert name not in found
        elif isinstance(module, Conv1D):
            assert found.pop(name) == tuple(module.weight.shape)
        elif isinstance(module, torch.nn.Linear):
            assert found.pop(name) == (module.in_features, module.out_features)
    assert not found


@pytest.mark.parametrize(
    ("architecture", "kv_heads", "head_dim"),
    [("llama", 2, 16), ("qwen3", 2, 32), ("gemma3_text", 2, 24), ("gpt2", 4, 16), ("gpt_neox", 4, 16)],
)
def test_head_sizes_come_from_the_configuration_or_from_the_width(
    architecture: str, kv_heads: int, head_dim: int
) -> None:
    shape = read_shape(tiny_config(architecture))
    assert (shape.kv_heads, shape.head_dim) == (kv_heads, head_dim)


def test_tied_embeddings_are_counted_once() -> None:
    tied, untied = (read_shape(tiny_config("llama", tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.parameters - tied.parameters == untied.head == 128 * 64
    assert tied.head == 0


def test_norms_on_a_head_are_read_once_for_each_head() -> None:
    plain, per_head = read_shape(tiny_config("llama")), read_shape(tiny_config("qwen3"))
    assert plain.extra["norm_width"] == (2 * 3 + 1) * 64
    assert per_head.extra["norm_width"] == plain.extra["norm_width"] + 3 * (4 + 2) * 32


def test_fused_experts_are_parameters_but_no_linears() -> None:
    shape = read_shape(tiny_config("mixtral"))
    experts = 3 * 4 * (3 * 64 * 96)
    assert shape.parameters > experts
    assert not any("expert" in linear.name for linear in shape.linears)
    assert shape.extra["ffn_width"] == 3 * 2 * 96


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-65b", 65_285_660_672),
        ("smollm2-135m", 134_515_008),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_shipped_configurations_have_the_published_sizes(name: str, parameters: int) -> None:
    assert read_shape(AutoConfig.from_pretrained(SHAPES / name)).parameters == parameters


def test_every_shipped_configuration_is_checked() -> None:
    marks = test_shipped_configurations_have_the_published_sizes.pytestmark  # type: ignore[attr-defined]
    assert {name for name, _ in marks[0].args[1]} == {path.name for path in SHAPES.iterdir()}


@pytest.mark.parametrize(
    ("method", "settings", "trainable"),
    [
        ("lora", {"rank": 8, "target_modules": ("q_proj", "v_proj")}, 4_194_304),
        ("lora", {"rank": 16}, 39_976_960),
        ("qlora", {"rank": 16}, 39_976_960),
        ("lora", {"rank": 64}, 159_907_840),
        ("dora", {"rank": 16}, 41_336_832),
        ("full", {}, 6_738_415_616),
    ],
)
def test_trainable_parameters_of_llama_2_7b(method: str, settings: dict[str, Any], trainable: int) -> None:
    shape = read_shape(AutoConfig.from_pretrained(SHAPES / "llama-2-7b"))
    assert METHODS[method](**settings).trainable_parameters(shape) == trainable


def test_no_storage_is_allocated() -> None:
    # 405B parameters: reading would fail on any machine if it allocated
    config = LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    assert read_shape(config).parameters == 405_853_388_800


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot build a causal language model of type `t5`"):
        read_shape(T5Config())


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration of a model that comes with its own code, kept out of the caches and the registries."""
    cache = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(AutoConfig, "register", lambda *args, **options: None)
    monkeypatch.setattr(AutoModelForCausalLM, "register", lambda *args, **options: None)
    folder = tmp_path / "own_model"
    folder.mkdir()
    (folder / "own.py").write_text(OWN_CODE)
    config = tiny_config("llama").to_dict() | {
        "model_type": "own_llama",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_own_code_runs_where_it_is_trusted(own_code: Any) -> None:
    shape = read_shape(own_code, trust_remote_code=True)
    assert shape.model_type == "own_llama"
    assert shape.parameters == read_shape(tiny_config("llama")).parameters


def test_own_code_is_refused_without_a_question_where_it_is_not_trusted(
    own_code: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": questions.append(prompt) or "y")
    with pytest.raises(ModelError, match="of type `own_llama`") as caught:
        read_shape(own_code)
    assert not questions
    assert "model.trust_remote_code" in (caught.value.help or "")


def targets_of(architecture: str) -> list[dict[str, Any]]:
    leaves = list(
        dict.fromkeys(linear.name.rpartition(".")[2] for linear in read_shape(tiny_config(architecture)).linears)
    )
    return [
        {},
        {"target_modules": (leaves[0],)},
        {"target_modules": tuple(leaves[-2:])},
        {"target_modules": rf".*\.1\..*{leaves[0]}"},
    ]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("architecture", DENSE)
def test_predicted_trainable_parameters_equal_the_actual(architecture: str, name: str) -> None:
    checked = 0
    for settings in targets_of(architecture):
        if not settings.keys() <= METHODS[name].model_fields.keys():
            continue
        method: Method = METHODS[name](**settings)
        model = built(architecture)
        predicted = method.trainable_parameters(shape_of(model))
        context = Context(total_steps=10, seed=0, dtype=torch.float32, device=torch.device("cpu"))
        adapted = method.adapt(model, context)
        assert predicted == sum(p.numel() for p in adapted.parameters() if p.requires_grad), settings
        checked += 1
    assert checked
