"""Bases that bitsandbytes stored in 4 or 8 bits work as quantized ones do; other schemes are refused by the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target
from ftune.errors import ModelError
from ftune.methods.lora import Lora
from ftune.models.quantization import dequantize, is_4bit
from ftune.plan.base_model import check_weights, load_base
from ftune.plan.resolve import resolve
from ftune.recipe.load import Loaded
from ftune.recipe.schema import ModelSpec

CPU = torch.device("cpu")
FILE = "model.safetensors"
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
STORED: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4-double": NF4 | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float16},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-in-bfloat16": NF4 | {"bnb_4bit_quant_storage": torch.bfloat16},
    "nf4-of-some": NF4 | {"llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp"]},
    "int8": {"load_in_8bit": True},
}


def quantized_dir(path: Path, stored: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save the tiny model as bitsandbytes stores it."""
    tiny.model_dir(path)
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=BitsAndBytesConfig(**STORED[stored]), dtype=dtype, device_map={"": "cpu"}
    )
    (path / FILE).unlink()
    model.save_pretrained(path)
    return path


def recipe(where: Path, stored: str, method: str = "lora", /, **blocks: Any) -> Loaded:
    loaded = tiny.recipe(where, method, **blocks)
    quantized_dir(where / "base", stored)
    return loaded


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_base_computes_as_its_dequantized_weights(stored: str, dtype: torch.dtype, tmp_path: Path) -> None:
    spec = ModelSpec(id=str(quantized_dir(tmp_path / "m", stored, torch.bfloat16)))
    base = load_base(spec, Lora(), dtype, CPU)
    packed = [module for module in base.modules() if is_4bit(module)]
    assert len(packed) == {"int8": 0, "nf4-of-some": 11}.get(stored, 14)
    assert {str(p.dtype) for p in base.parameters() if type(p) is torch.nn.Parameter} == {str(dtype)}
    assert {module.compute_dtype for module in packed} <= {dtype}
    assert {parameter.dtype for parameter in base.parameters()} <= {dtype, torch.uint8}
    logits = tiny.logits(base)
    plain = dequantize(base).float()
    assert torch.allclose(logits.float(), tiny.logits(plain), atol=1e-4 if dtype == torch.float32 else 0.2)
    weights = plain.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert 0 < (weights - tiny.model().get_parameter("model.layers.0.mlp.up_proj.weight")).abs().max() < 0.1


def test_codes_of_8_bits_mean_what_bitsandbytes_says_they_do(tmp_path: Path) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant

    directory = quantized_dir(tmp_path / "m", "int8")
    stored, name = load_file(directory / FILE), "model.layers.1.self_attn.k_proj"
    base = load_base(ModelSpec(id=str(directory)), Lora(), torch.float32, CPU)
    expected = int8_vectorwise_dequant(stored[f"{name}.weight"], stored[f"{name}.SCB"])
    assert torch.allclose(base.get_parameter(f"{name}.weight"), expected, atol=1e-6)


def test_the_plan_takes_the_quantization_from_the_files(tmp_path: Path) -> None:
    for stored, method, expected in (
        ("nf4-double", "lora", ("nf4", True)),
        ("nf4-double", "qlora", ("nf4", True)),
        ("fp4", "qlora", ("fp4", False)),
    ):
        where = tmp_path / stored / method
        where.mkdir(parents=True)
        found = resolve(recipe(where, stored, method).recipe).recipe.method.base_quantization
        assert found is not None
        assert (found.type, found.double) == expected


def test_another_quantization_than_the_files_have_is_refused(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "nf4", "qlora", method={"quantization": {"double": True}}).recipe
    with pytest.raises(ModelError, match=r"quantization.double: True`, but .* is stored with `double: False`"):
        resolve(asked)


@pytest.mark.parametrize(
    ("stored", "method"), [("nf4", "full"), ("nf4", "galore"), ("nf4", "prefix"), ("int8", "full"), ("int8", "galore")]
)
def test_a_method_that_needs_plain_weights_is_refused(stored: str, method: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"`{method}` needs weights that are not quantized") as error:
        resolve(recipe(tmp_path, stored, method).recipe)
    assert "lora, qlora" in (error.value.help or "")


def test_what_does_not_go_with_4_bits_is_refused_as_with_a_quantization_block(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"stored in 4 bits: `init: pissa`"):
        resolve(recipe(tmp_path, "nf4", "lora", method={"init": "pissa"}).recipe)


@pytest.mark.parametrize(
    "scheme",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "mxfp4"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "turboquant9"},
        {"quant_method": "bitsandbytes"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int5"},
        {},
    ],
)
def test_other_schemes_are_refused_by_name(scheme: dict[str, Any], tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path)
    path = tmp_path / "base/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": scheme}))
    with pytest.raises(ModelError, match=f"is quantized by `{scheme.get('quant_method', 'unknown')}`") as error:
        resolve(loaded.recipe)
    assert "the model that it was made of" in (error.value.help or "")
    with pytest.raises(ModelError, match="is quantized by"):
        load_base(loaded.recipe.model, Lora(), torch.float32, CPU)


@pytest.mark.parametrize(
    ("stored", "lost"),
    [
        ("nf4", "model.layers.1.mlp.down_proj.weight"),
        ("nf4", "model.layers.1.mlp.down_proj.weight.absmax"),
        ("nf4-double", "model.layers.1.mlp.down_proj.weight.nested_absmax"),
        ("nf4", "model.norm.weight"),
        ("int8", "model.layers.1.mlp.down_proj.SCB"),
        ("int8", "model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_a_tensor_missing_from_packed_files_is_named(stored: str, lost: str, tmp_path: Path) -> None:
    directory = quantized_dir(tmp_path / "m", stored)
    weights = load_file(directory / FILE)
    del weights[lost]
    save_file(weights, directory / FILE, {"format": "pt"})
    named = "model.norm.weight" if "norm" in lost else "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(ModelError, match=named):
        check_weights(ModelSpec(id=str(directory)))


@pytest.mark.parametrize("bits", [4, 8])
def test_plain_weights_that_are_said_to_be_packed_are_refused(bits: int, tmp_path: Path) -> None:
    path = tiny.model_dir(tmp_path / "m") / "config.json"
    scheme = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": scheme}))
    with pytest.raises(ModelError, match="its files hold no scales"):
        check_weights(ModelSpec(id=str(tmp_path / "m")))


def test_packed_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = quantized_dir(tmp_path / "m", "nf4") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"down_proj.weight` \(64 x 128, not 64 x 96\)"):
        check_weights(ModelSpec(id=str(tmp_path / "m")))


@pytest.mark.parametrize("stored", ["nf4-double", "int8"])
def test_train_resume_evaluate_and_merge(stored: str, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, stored, checkpoint={"every_steps": 2})
    path = tmp_path / "recipe.yaml"
    path.write_text(loaded.text)
    record = train(loaded, progress=False)
    assert record["status"] == "finished"
    assert (record["vitals"].get("quantized_layers") == 14) == (stored != "int8")
    assert any("8 bits" in line for line in record["plan"]["warnings"]) == (stored == "int8")
    assert train(loaded, progress=False, resume=True)["status"] == "finished"
    result = evaluate(find_target(path), base=True)
    assert result["tuned"]["loss"] != result["base"]["loss"]
    report = merge(RunDir(tmp_path / "run"))
    assert report["merged_vs_adapter"]["max_error"] < 1e-3
    config = json.loads((tmp_path / "run/merged/config.json").read_text())
    assert config.get("quantization_config") is None
    assert check_weights(ModelSpec(id=str(tmp_path / "run/merged"))) == ()
