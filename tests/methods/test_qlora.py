"""QLoRA: the base in 4 bits, whichever way it is loaded, and a merge that is the model that was trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ftune.artifacts.training import train
from ftune.methods import METHODS, OptimizerSpec
from ftune.methods.quantization import Quantization
from ftune.methods.targets import list_linears
from ftune.models.quantization import is_4bit
from ftune.plan.base_model import load_base
from ftune.plan.quantized import keep_packed, quantize
from ftune.recipe.schema import ModelSpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_dir(tmp_path_factory.mktemp("base"))


def quantized(where: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> torch.nn.Module:
    method = tiny.method("qlora", quantization=settings)
    return load_base(ModelSpec(id=str(where)), method, dtype, CPU)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_in_place_equals_from_pretrained(kind: str, double: bool, dtype: Any, base_dir: Path) -> None:
    expected = quantized(base_dir, dtype, type=kind, double=double)
    dense = AutoModelForCausalLM.from_pretrained(str(base_dir), dtype=dtype)
    quantize(dense, Quantization(type=kind, double=double).config(dtype), CPU)
    keep_packed(dense)
    layers = [(a, b) for a, b in zip(expected.modules(), dense.modules(), strict=True) if is_4bit(a)]
    assert len(layers) == 14
    for a, b in layers:
        assert torch.equal(a.weight.data, b.weight.data)
        assert a.weight.quant_state.dtype == b.weight.quant_state.dtype == dtype
    assert torch.equal(tiny.logits(expected), tiny.logits(dense))


def test_settings_reach_the_weights(base_dir: Path) -> None:
    def first(model: torch.nn.Module) -> Any:
        return next(module for module in model.modules() if is_4bit(module))

    assert first(quantized(base_dir, type="fp4")).weight.quant_state.quant_type == "fp4"
    assert first(quantized(base_dir)).weight.quant_state.quant_type == "nf4"
    assert first(quantized(base_dir, double=True)).weight.quant_state.nested
    assert not first(quantized(base_dir, double=False)).weight.quant_state.nested
    assert first(quantized(base_dir, compute_dtype="bfloat16")).compute_dtype == torch.bfloat16


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    model.train()
    model.zero_grad()
    ids = tiny.batch()["input_ids"]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_pass_leaves_gradients_as_they_were(dtype: torch.dtype, base_dir: Path) -> None:
    from ftune.run.objective import autocast

    method = tiny.method("qlora")
    model = method.adapt(quantized(base_dir, dtype), tiny.context(dtype=dtype))
    tiny.disturb(model)
    packed = [m.weight.data.clone() for m in model.modules() if is_4bit(m)]
    with autocast(dtype, "cpu"):
        before = gradients(model)
        tiny.logits(model)
        after = gradients(model)
    assert all(map(torch.equal, before, after))
    assert all(map(torch.equal, packed, [m.weight.data for m in model.modules() if is_4bit(m)]))


def test_the_naive_merge_is_another_model(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256}
    base_dir = tiny.model_dir(tmp_path / "base", **sizes)
    method, context = tiny.method("qlora"), tiny.context()
    model = method.adapt(quantized(base_dir), context)
    tiny.disturb(model)
    expected = tiny.logits(model)
    method.save(model, tmp_path, context)
    right = method.merge(method.load(quantized(base_dir), tmp_path, context), context)
    assert (tiny.logits(right) - expected).abs().max() <= 1e-4
    naive = PeftModel.from_pretrained(tiny.model(**sizes), str(tmp_path)).merge_and_unload()
    assert (tiny.logits(naive) - expected).abs().max() > 1


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_quantization_block_makes_any_low_rank_method_4_bit(name: str, base_dir: Path, tmp_path: Path) -> None:
    method, context = tiny.method(name, quantization={}), tiny.context()
    base = load_base(ModelSpec(id=str(base_dir)), method, torch.float32, CPU)
    assert sum(map(is_4bit, base.modules())) == 14
    model = method.adapt(base, context)
    tiny.disturb(model)
    expected = tiny.logits(model)
    method.save(model, tmp_path, context)
    merged = method.merge(
        method.load(load_base(ModelSpec(id=str(base_dir)), method, torch.float32, CPU), tmp_path, context),
        context,
    )
    assert (tiny.logits(merged) - expected).abs().max() <= 1e-4


def tensors(state: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(state):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_bitsandbytes_optimizers_train_and_resume(optimizer: str, tmp_path: Path, monkeypatch: Any) -> None:
    from run.test_loop import assert_equal, train_until, weights

    block = {"optimizer": {"name": optimizer, "learning_rate": 1e-2}}
    # bitsandbytes keeps states of small matrices in fp32: a rank at which they are large enough for 8 bits
    block["method"] = {"rank": 64}
    train(tiny.recipe(tmp_path, "qlora", output_dir=str(tmp_path / "whole"), **block))
    parts = tiny.recipe(tmp_path, "qlora", output_dir=str(tmp_path / "parts"), **block)
    train_until(parts, 2)
    train(parts, resume=True)
    assert_equal(weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4))
    state = torch.load(tmp_path / "parts/checkpoints/step-4/optimizer.pt", weights_only=True)["state"]
    kinds = {tensor.dtype for tensor in tensors(state)}
    assert (torch.uint8 in kinds) == ("8bit" in optimizer)


def test_predicted_bytes_of_the_base_are_the_actual_ones(base_dir: Path) -> None:
    from ftune.plan.shapes import read_shape

    method = tiny.method("qlora")
    model = quantized(base_dir)
    predicted = method.base_bytes(read_shape(tiny.config()), 4)
    actual = sum(p.numel() * p.element_size() for p in model.parameters())
    for layer in (m for m in model.modules() if is_4bit(m)):
        state = layer.weight.quant_state
        actual += state.absmax.nbytes + state.state2.absmax.nbytes
    assert predicted == pytest.approx(actual, rel=0.01)
    assert len(list_linears(model)) == 14


def test_qlora_is_lora_with_a_quantization_block(base_dir: Path) -> None:
    models = []
    for method in (METHODS["qlora"](rank=4), METHODS["lora"](rank=4, quantization={})):
        base = load_base(ModelSpec(id=str(base_dir)), method, torch.float32, CPU)
        model = method.adapt(base, tiny.context())
        optimizer = method.optimizer(model, OptimizerSpec(learning_rate=1e-2))
        gradients(model)
        optimizer.step()
        models.append(tiny.logits(model))
    assert torch.equal(*models)
