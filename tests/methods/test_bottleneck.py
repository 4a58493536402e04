"""Bottleneck adapters: the published formula at the published places, in ftune's own file."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from ftune.artifacts.generate import greedy
from ftune.artifacts.training import train
from ftune.errors import ModelError, RecipeError
from ftune.methods import Method, OptimizerSpec
from ftune.plan.recompute import enable_checkpointing
from ftune.plan.shapes import read_shape
from ftune.recipe import require
from ftune.run.objective import autocast

sys.path.append(str(Path(__file__).parents[1] / "plan"))
from architectures import tiny_config

LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
BLOCKS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2"]


def bottleneck(**settings: Any) -> Method:
    return tiny.method("bottleneck", **settings)


def adapted(method: Method, base: nn.Module | None = None) -> nn.Module:
    return method.adapt((base or tiny.model()).requires_grad_(False), tiny.context())


def architecture(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="eager").requires_grad_(False)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("variant", "count"), [("houlsby", 33_820_672), ("pfeiffer", 16_910_336)])
def test_parameters_on_llama_2_7b(variant: str, count: int) -> None:
    assert bottleneck(variant=variant, bottleneck_size=64).trainable_parameters(read_shape(LLAMA_7B)) == count


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer"])
def test_the_start_is_the_base_to_the_last_bit(variant: str) -> None:
    assert torch.equal(tiny.logits(adapted(bottleneck(variant=variant))), tiny.logits(tiny.model()))


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
@pytest.mark.parametrize(("variant", "places"), [("houlsby", ("o_proj", "down_proj")), ("pfeiffer", ("down_proj",))])
def test_the_file_holds_the_published_formula(
    activation: str, variant: str, places: tuple[str, ...], tmp_path: Path
) -> None:
    """The base with ``h + W_up f(W_down h)`` written out from the saved tensors gives the adapted model's logits."""
    method = bottleneck(variant=variant, activation=activation)
    model = adapted(method)
    tiny.disturb(model)
    method.save(model, tmp_path, tiny.context())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    f = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[activation]

    class Written(nn.Module):
        def __init__(self, inner: nn.Module, name: str) -> None:
            super().__init__()
            self.inner = inner
            self.t = {key.removeprefix(name + "."): value for key, value in tensors.items() if key.startswith(name)}

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            z = f(h @ self.t["down.weight"].T + self.t["down.bias"])
            return h + z @ self.t["up.weight"].T + self.t["up.bias"]

    base = tiny.model()
    written = 0
    for name, module in list(base.named_modules()):
        if name.rsplit(".", 1)[-1] in places:
            parent, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(parent), leaf, Written(module, name))
            written += 1
    assert written == 2 * len(places)
    assert len(tensors) == 4 * written
    expected = tiny.logits(base)
    assert (tiny.logits(model) - expected).abs().max() <= 1e-5
    assert (tiny.logits(tiny.model()) - expected).abs().max() > 1e-2


def test_the_base_keeps_its_names_and_class() -> None:
    model = adapted(bottleneck())
    assert type(model) is type(tiny.model())
    added = set(model.state_dict()) - set(tiny.model().state_dict())
    assert set(tiny.model().state_dict()) < set(model.state_dict())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == added


@pytest.mark.parametrize("name", BLOCKS)
def test_trains_saves_and_loads_on(name: str, tmp_path: Path) -> None:
    method = bottleneck()
    model = adapted(method, architecture(name))
    ids = tiny.batch()["input_ids"] % 128
    inputs = {"input_ids": ids}
    assert torch.equal(tiny.logits(model, inputs), tiny.logits(architecture(name), inputs))
    optimizer = method.optimizer(model.train(), OptimizerSpec(learning_rate=1e-2))
    for _ in range(3):
        found = gradients(model, ids)
        assert len(found) == 4 * 2 * 3
        optimizer.step()
    assert method.not_at_work(method.vitals(model, optimizer)) is None
    trained = tiny.logits(model, inputs)
    assert (trained - tiny.logits(architecture(name), inputs)).abs().max() > 1e-3
    method.save(model, tmp_path, tiny.context())
    assert torch.equal(tiny.logits(method.load(architecture(name), tmp_path, tiny.context()), inputs), trained)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == method.trainable_parameters(read_shape(tiny_config(name)))


# the name that all transformers of version 5 know
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_recomputed_blocks_give_the_same_gradients() -> None:
    ids = tiny.batch()["input_ids"]
    models = [adapted(bottleneck()).train() for _ in range(2)]
    for model in models:
        tiny.disturb(model)
    enable_checkpointing(models[1])
    plain, recomputed = (gradients(model, ids) for model in models)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


def test_a_copy_runs_its_own_adapters() -> None:
    model = adapted(bottleneck())
    tiny.disturb(model)
    twin = copy.deepcopy(model)
    expected = tiny.logits(twin)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(tiny.logits(twin), expected)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.model()))


@pytest.mark.parametrize("cast", [True, False])
def test_fp32_adapters_on_a_bfloat16_base(cast: bool) -> None:
    def logits(model: nn.Module) -> Tensor:
        with autocast(torch.bfloat16 if cast else torch.float32, "cpu"):
            return tiny.logits(model)

    base = tiny.model().bfloat16()
    before = logits(base)
    model = adapted(bottleneck(), base)
    assert torch.equal(logits(model), before)
    tiny.disturb(model, 1.0)
    after = logits(model)
    assert after.dtype == before.dtype
    assert (after - before).abs().max() > 1e-2
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_generation_with_a_cache_and_left_padding_equals_one_token_after_another() -> None:
    model = adapted(bottleneck()).eval()
    tiny.disturb(model, 1.0)
    tokenizer = tiny.tokenizer()
    prompts = [tokenizer("Hello").input_ids, tokenizer("A longer prompt").input_ids]
    expected = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in (tokenizer.eos_token_id, model.generation_config.eos_token_id):
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip())

    def answers() -> list[str]:
        found = greedy(model, tokenizer, prompts, dtype=torch.float32, batch_size=2, max_new_tokens=8)
        return [answer.text for answer in found]

    assert answers() == expected
    with bottleneck().switched_off(model):  # type: ignore[union-attr]
        assert answers() != expected


def test_switching_off_nests_and_survives_an_error() -> None:
    method = bottleneck()
    model = adapted(method)
    tiny.disturb(model)
    on, base = tiny.logits(model), tiny.logits(tiny.model())

    def fail_inside() -> None:
        with method.switched_off(model):  # type: ignore[union-attr]
            with method.switched_off(model):  # type: ignore[union-attr]
                pass
            assert torch.equal(tiny.logits(model), base)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert torch.equal(tiny.logits(model), on)


@pytest.mark.parametrize(
    ("settings", "config", "difference"),
    [
        ({"variant": "pfeiffer"}, {}, "variant: 'houlsby'"),
        ({"bottleneck_size": 4}, {}, "bottleneck_size: 8"),
        ({"activation": "relu"}, {}, "activation: 'gelu'"),
        ({}, {"hidden_size": 32}, "hidden_size: 64"),
        ({}, {"num_hidden_layers": 1}, "positions: model.layers.0.self_attn.o_proj and 3 more"),
    ],
)
def test_what_does_not_fit_is_not_loaded(
    settings: dict[str, Any], config: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    bottleneck().save(adapted(bottleneck()), tmp_path, tiny.context())
    with pytest.raises(ModelError, match=difference):
        bottleneck(**settings).load(tiny.model(**config), tmp_path, tiny.context())


def test_a_newer_or_broken_file_is_not_loaded(tmp_path: Path) -> None:
    bottleneck().save(adapted(bottleneck()), tmp_path, tiny.context())
    path = tmp_path / "ftune_adapter.json"
    described = json.loads(path.read_text())
    assert described["base_model_name_or_path"] == "tiny/llama"
    path.write_text(json.dumps(described | {"format_version": 2}))
    with pytest.raises(ModelError, match="format_version: 2"):
        bottleneck().load(tiny.model(), tmp_path, tiny.context())
    path.write_text("{")
    with pytest.raises(ModelError, match="cannot read"):
        bottleneck().load(tiny.model(), tmp_path, tiny.context())


def test_blocks_without_these_projections_are_refused() -> None:
    shape = read_shape(tiny_config("mixtral"))
    with pytest.raises(ModelError, match="mixtral: the feed-forward's last projection was found 0 times"):
        bottleneck().trainable_parameters(shape)
    with pytest.raises(ModelError, match="mixtral"):
        adapted(bottleneck(), architecture("mixtral"))


def test_a_width_given_twice_is_refused_while_parsing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="both give the width"):
        require(tiny.recipe(tmp_path, "bottleneck", method={"reduction_factor": 16}))


def test_a_reduction_to_nothing_is_refused_by_the_plan(tmp_path: Path) -> None:
    method = {"bottleneck_size": None, "reduction_factor": 65}
    with pytest.raises(ModelError, match="leaves nothing of a hidden width of 64"):
        train(tiny.recipe(tmp_path, "bottleneck", method=method))


def test_the_default_reduction_is_written_out() -> None:
    from ftune.methods import METHODS

    method = METHODS["bottleneck"]()
    assert method.resolved().model_dump()["reduction_factor"] == 16
    assert adapted(method).get_submodule("model.layers.0.mlp.down_proj.bottleneck.down").out_features == 4
