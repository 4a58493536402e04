"""(IA)^3: what the vectors scale, that nothing pulls them to zero, and what 16 and 4 bits do to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import tiny_config
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from ftune.errors import ModelError, RecipeError
from ftune.methods import Method, OptimizerSpec
from ftune.models.quantization import is_4bit
from ftune.plan.base_model import load_base
from ftune.plan.shapes import read_shape
from ftune.recipe import require
from ftune.recipe.schema import ModelSpec
from ftune.run.objective import autocast

SHAPES = Path(__file__).parents[2] / "ftune" / "shapes"


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model_dir(tmp_path_factory.mktemp("base"))


def on_disk(method: Method, where: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_base(ModelSpec(id=str(where)), method, dtype, torch.device("cpu"))


def vectors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("ia3_l" in name for name in found)
    return {name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): p for name, p in found.items()}


def test_parameters_on_llama_2_7b() -> None:
    shape = read_shape(AutoConfig.from_pretrained(SHAPES / "llama-2-7b"))
    count = tiny.method("ia3").trainable_parameters(shape)
    assert count == 32 * (4096 + 4096 + 11008) == 614_400
    assert count / shape.parameters == pytest.approx(0.000091, rel=0.01)


def test_it_scales_rows_of_keys_and_values_and_columns_of_the_way_back() -> None:
    model = tiny.method("ia3").adapt(tiny.model(), tiny.context())
    tiny.disturb(model)
    dense = tiny.model()
    with torch.no_grad():
        for name, factor in vectors(model).items():
            factor_F = factor.flatten()
            weight_MN = dense.get_submodule(name).weight
            weight_MN.mul_(factor_F[None] if name.endswith("down_proj") else factor_F[:, None])
    assert (tiny.logits(model) - tiny.logits(dense)).abs().max() <= 2e-5
    assert (tiny.logits(model) - tiny.logits(tiny.model())).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("architecture", "outputs", "inputs"),
    [
        ("llama", ["k_proj", "v_proj"], "mlp.down_proj"),
        ("gemma3_text", ["k_proj", "v_proj"], "mlp.down_proj"),
        ("phi3", ["qkv_proj"], "mlp.down_proj"),
        ("gpt2", ["c_attn"], "mlp.c_proj"),
        ("gpt_neox", ["query_key_value"], "mlp.dense_4h_to_h"),
    ],
)
def test_targets_are_found_whatever_their_names(architecture: str, outputs: list[str], inputs: str) -> None:
    base = AutoModelForCausalLM.from_config(tiny_config(architecture))
    model = tiny.method("ia3").adapt(base, tiny.context())
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "ia3_l")}
    assert len(layers) == 3 * (len(outputs) + 1)
    for name, layer in layers.items():
        assert layer.is_feedforward == name.endswith(inputs)
        assert layer.is_feedforward or name.rpartition(".")[2] in outputs
    expected = tiny.method("ia3").trainable_parameters(read_shape(tiny_config(architecture)))
    assert sum(p.numel() for p in vectors(model).values()) == expected


LAYER_0 = r"model\.layers\.0\..*(v_proj|up_proj|down_proj)"


@pytest.mark.parametrize(
    ("settings", "count", "inputs"),
    [
        ({"target_modules": "all-linear"}, 14, {"down_proj"}),
        ({"target_modules": ("q_proj", "up_proj"), "feedforward_modules": ("up_proj",)}, 4, {"up_proj"}),
        ({"target_modules": ("k_proj", "down_proj"), "feedforward_modules": ()}, 4, set()),
        ({"target_modules": LAYER_0}, 3, {"down_proj"}),
        ({"target_modules": ("v_proj",)}, 2, set()),
    ],
)
def test_chosen_targets_are_saved_as_peft_loads_them(settings: Any, count: int, inputs: set, tmp_path: Path) -> None:
    method = tiny.method("ia3", **settings)
    model = method.adapt(tiny.model(), tiny.context())
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "ia3_l")}
    assert len(layers) == count
    assert {name.rpartition(".")[2] for name, layer in layers.items() if layer.is_feedforward} == inputs
    assert sum(p.numel() for p in vectors(model).values()) == method.trainable_parameters(read_shape(tiny.config()))
    tiny.disturb(model)
    method.save(model, tmp_path, tiny.context())
    assert torch.equal(tiny.logits(PeftModel.from_pretrained(tiny.model(), str(tmp_path))), tiny.logits(model))


def test_a_long_list_of_targets_is_loaded_again(tmp_path: Path) -> None:
    # One layer of twelve is left out, so that whole names are needed: more than PEFT keeps as a list.
    method = tiny.method("ia3", target_modules=r".*layers\.(?!3\.).*(k_proj|v_proj|down_proj)")
    model = method.adapt(tiny.model(num_hidden_layers=12), tiny.context())
    assert len(vectors(model)) == 33
    tiny.disturb(model)
    method.save(model, tmp_path, tiny.context())
    again = PeftModel.from_pretrained(tiny.model(num_hidden_layers=12), str(tmp_path))
    assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("k_proj", "c_attn")}, "target_modules: `c_attn` is no linear layer"),
        ({"feedforward_modules": ("fc2",)}, "feedforward_modules: `fc2` is no linear layer"),
        ({"feedforward_modules": ".*fc2"}, "feedforward_modules: '.*fc2' matches no linear layer"),
        ({"target_modules": ("k_proj",), "feedforward_modules": ("down_proj",)}, "not among target_modules"),
    ],
)
def test_what_the_model_does_not_have_is_refused(settings: Any, message: str) -> None:
    method = tiny.method("ia3", **settings)
    with pytest.raises(ModelError, match=message):
        method.adapt(tiny.model(), tiny.context())
    with pytest.raises(ModelError, match=message):
        method.trainable_parameters(read_shape(tiny.config()))


def test_an_expression_that_is_the_end_of_a_name_says_how_names_are_matched() -> None:
    with pytest.raises(ModelError, match="'k_proj' matches no linear layer") as error:
        tiny.method("ia3", target_modules="k_proj").adapt(tiny.model(), tiny.context())
    assert "`model.layers.0.self_attn.q_proj`: begin it with `.*`" in (error.value.help or "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": []}, "would train nothing"),
        ({"target_modules": ["lm_head"]}, "cannot be merged"),
        ({"feedforward_modules": "*proj"}, "not a regular expression"),
    ],
)
def test_what_cannot_work_is_refused_while_parsing(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        require(tiny.recipe(tmp_path, "ia3", method=settings))


def test_weight_decay_leaves_the_vectors_at_one() -> None:
    method = tiny.method("ia3")
    changes = []
    for decays in (type(method).decays, Method.decays):
        model = method.adapt(tiny.model(), tiny.context())
        rule = type("Rule", (type(method),), {"decays": decays})()
        optimizer = rule.optimizer(model, OptimizerSpec(learning_rate=5e-3, weight_decay=0.1))
        for parameter in vectors(model).values():
            parameter.grad = torch.zeros_like(parameter)
        for _ in range(200):
            optimizer.step()
        changes.append({float(p.detach().mean()) for p in vectors(model).values()})
    assert changes[0] == {1.0}
    # What the rule for matrices would do: the vectors are stored as such.
    assert all(value == pytest.approx(0.905, abs=1e-3) for value in changes[1])


def dtypes_of(model: torch.nn.Module) -> set[torch.dtype]:
    """What comes out of the scaled projections, the feed-forwards and the blocks."""
    seen = set()

    def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        seen.add((output[0] if isinstance(output, tuple) else output).dtype)

    hooks = [
        module.register_forward_hook(look)
        for name, module in model.named_modules()
        if name.endswith(("k_proj", "v_proj", "down_proj", "mlp", "layers.0", "layers.1"))
    ]
    tiny.logits(model)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("quantization", [None, {}])
def test_in_bfloat16_the_residual_stream_stays_bfloat16(quantization: Any, base_dir: Path, tmp_path: Path) -> None:
    method, context = tiny.method("ia3", quantization=quantization), tiny.context(dtype=torch.bfloat16)
    with autocast(torch.bfloat16, "cpu"):
        model = method.adapt(on_disk(method, base_dir, torch.bfloat16), context)
        assert dtypes_of(model) == {torch.bfloat16}
        method.save(model, tmp_path, context)
        again = method.load(on_disk(method, base_dir, torch.bfloat16), tmp_path, context)
        assert dtypes_of(again) == {torch.bfloat16}
    assert (quantization is None) != any(map(is_4bit, model.modules()))


def test_bfloat16_follows_fp32_and_keeps_small_updates(base_dir: Path) -> None:
    """Updates of less than bfloat16 resolves next to one (2^-8) add up, because the vectors are fp32."""
    method = tiny.method("ia3")
    ids = tiny.batch(4, 32)["input_ids"]
    changes, logits = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = method.adapt(on_disk(method, base_dir, dtype), tiny.context(dtype=dtype))
        optimizer = method.optimizer(model, OptimizerSpec(learning_rate=1e-3))
        for _ in range(12):
            optimizer.zero_grad()
            with autocast(dtype, "cpu"):
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        with autocast(dtype, "cpu"):
            logits.append(tiny.logits(model).float())
        changes.append(torch.cat([p.detach().flatten() - 1 for p in vectors(model).values()]))
    assert changes[1].abs().mean() > 5e-3
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.98
    assert (logits[1] - logits[0]).abs().max() <= 0.02 * logits[0].abs().max()


@pytest.mark.parametrize("quantization", [None, {}])
@pytest.mark.parametrize(("push", "at_work"), [(2**-9, False), (-(2**-9), False), (2**-8, True), (-(2**-8), True)])
def test_factors_that_bfloat16_rounds_away_are_not_at_work(
    push: float, at_work: bool, quantization: Any, base_dir: Path
) -> None:
    """The reference is the base itself, bit for bit."""
    method = tiny.method("ia3", quantization=quantization)
    base = on_disk(method, base_dir, torch.bfloat16)
    with autocast(torch.bfloat16, "cpu"):
        expected = tiny.logits(base)
        model = method.adapt(base, tiny.context(dtype=torch.bfloat16))
        with torch.no_grad():
            for parameter in vectors(model).values():
                parameter.add_(push)
        assert torch.equal(tiny.logits(model), expected) != at_work
    vitals = method.vitals(model, method.optimizer(model, OptimizerSpec()))
    assert vitals["factors_at_work"] == at_work * vitals["factors"]
    assert ("raise the learning rate" in (method.not_at_work(vitals) or "")) != at_work
    assert method.vitals_line(vitals).count("100% by enough") == at_work


def test_in_fp32_the_smallest_change_is_at_work() -> None:
    method = tiny.method("ia3")
    model = method.adapt(tiny.model(), tiny.context())
    with torch.no_grad():
        for parameter in vectors(model).values():
            parameter.copy_(torch.nextafter(parameter, torch.zeros(())))
    vitals = method.vitals(model, method.optimizer(model, OptimizerSpec()))
    assert vitals["factors_at_work"] == vitals["factors"]
    assert method.not_at_work(vitals) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_onto_a_4_bit_base_it_is_what_was_trained(dtype: torch.dtype, base_dir: Path, tmp_path: Path) -> None:
    method, context = tiny.method("ia3", quantization={}), tiny.context(dtype=dtype)
    model = method.adapt(on_disk(method, base_dir, dtype), context)
    tiny.disturb(model)
    method.save(model, tmp_path, context)
    loaded = method.load(on_disk(method, base_dir, dtype), tmp_path, context)
    with autocast(dtype, "cpu"):
        expected = tiny.logits(loaded).float()
        assert torch.equal(tiny.logits(model).float(), expected)
    merged = method.merge(loaded, context)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    bound = 1e-4 if dtype == torch.float32 else 0.05
    assert (tiny.logits(merged) - expected).abs().max() <= bound
    # Onto the original weights it would be another model.
    naive = PeftModel.from_pretrained(tiny.model(), str(tmp_path)).merge_and_unload()
    assert (tiny.logits(naive) - expected).abs().max() > 0.2


def test_biases_are_merged() -> None:
    base = AutoModelForCausalLM.from_config(tiny_config("qwen2"))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    method = tiny.method("ia3")
    model = method.adapt(base, tiny.context())
    tiny.disturb(model)
    inputs = {"input_ids": tiny.batch()["input_ids"] % 128}
    expected = tiny.logits(model, inputs)
    assert (tiny.logits(method.merge(model, tiny.context()), inputs) - expected).abs().max() <= 2e-5


def test_one_vector_left_at_one_is_noticed() -> None:
    method = tiny.method("ia3")
    model = method.adapt(tiny.model(), tiny.context())
    optimizer = method.optimizer(model, OptimizerSpec())
    tiny.disturb(model)
    vitals = method.vitals(model, optimizer)
    assert not method.not_at_work(vitals)
    assert vitals["vectors"] == 6
    assert vitals["factors"] == 2 * (32 + 32 + 128)
    with torch.no_grad():
        next(iter(vectors(model).values())).fill_(1)
    assert "all ones" in (method.not_at_work(method.vitals(model, optimizer)) or "")
