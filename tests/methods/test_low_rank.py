"""LoRA's variants, DoRA's magnitudes, targets."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.errors import ModelError, RecipeError, RunFailed
from ftune.methods import Method, OptimizerSpec
from ftune.methods.targets import list_linears, match_targets
from ftune.plan.recompute import enable_checkpointing
from ftune.recipe import require


def adapted(method: Method, **context: Any) -> torch.nn.Module:
    return method.adapt(tiny.model(), tiny.context(**context))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_taken_out_of_the_base_fits_the_untouched_base(init: str, rslora: bool, tmp_path: Path) -> None:
    method = tiny.method("lora", init=init, rslora=rslora)
    model = adapted(method)
    assert (tiny.logits(model) - tiny.logits(tiny.model())).abs().max() <= 2e-5
    tiny.disturb(model)
    expected = tiny.logits(model)
    method.save(model, tmp_path, tiny.context())
    plain = PeftModel.from_pretrained(tiny.model(), str(tmp_path))
    assert (tiny.logits(plain) - expected).abs().max() <= 2e-5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    # Saving converts a copy: training goes on with the model as it was.
    assert torch.equal(tiny.logits(model), expected)
    # Without the conversion the adapter would be another model on the untouched base.
    (tmp_path / "naive").mkdir()
    object.__setattr__(model, "_ftune_initial", None)
    method.save(model, tmp_path / "naive", tiny.context())
    config = tmp_path / "naive/adapter_config.json"
    config.write_text(config.read_text().replace(f'"{init}"', "true"))
    naive = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "naive"))
    assert (tiny.logits(naive) - expected).abs().max() > 0.1


def test_resuming_on_another_decomposition_is_refused() -> None:
    method = tiny.method("lora", init="pissa")
    model = adapted(method)
    state = method.state(model)
    method.load_state(model, state)
    name = next(iter(state))
    with pytest.raises(RunFailed, match="decomposition"):
        method.load_state(model, state | {name: state[name] + 1e-3})


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_every_init_starts_as_the_base(init: str) -> None:
    model = adapted(tiny.method("lora", init=init))
    assert (tiny.logits(model) - tiny.logits(tiny.model())).abs().max() <= 2e-5


def test_inits_differ() -> None:
    found = [adapted(tiny.method("lora", init=init)).state_dict() for init in ("default", "gaussian", "orthogonal")]
    name = next(name for name in found[0] if "lora_A" in name)
    assert len({float(state[name].std()) for state in found}) == 3


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    layers = [
        next(m for m in adapted(tiny.method("lora", rank=16, alpha=8, rslora=r)).modules() if hasattr(m, "lora_A"))
        for r in (False, True)
    ]
    assert [layer.scaling["default"] for layer in layers] == [0.5, 2.0]


def test_lora_plus_gives_b_its_own_rate_and_keeps_weight_decay() -> None:
    method = tiny.method("lora", lora_plus_ratio=16)
    model = adapted(method)
    optimizer = method.optimizer(model, OptimizerSpec(learning_rate=1e-3, weight_decay=0.1))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1.6e-2 if "lora_B" in name else 1e-3)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    assert {group["base_lr"] for group in optimizer.param_groups} == {1e-3, 1.6e-2}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        (("q_proj", "v_proj"), 4),
        ((r"layers.0.mlp.up_proj",), 1),
        (r".*layers\.1\..*_proj", 7),
    ],
)
def test_targets_match_as_peft_matches(targets: Any, count: int) -> None:
    linears = list_linears(tiny.model())
    matched = {linear.name for linear in match_targets(linears, targets)}
    model = adapted(tiny.method("lora", target_modules=targets))
    actual = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert matched == actual
    assert len(matched) == count


@pytest.mark.parametrize("targets", [("q_proj", "c_attn"), r"nothing.*"])
def test_a_target_that_matches_nothing_is_refused(targets: Any) -> None:
    with pytest.raises(ModelError) as refused:
        adapted(tiny.method("lora", target_modules=targets))
    assert "down_proj, gate_proj" in (refused.value.help or "")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"target_modules": []}, "would train nothing"),
        ({"target_modules": ["lm_head"]}, "cannot be merged"),
        ({"target_modules": "all_linear"}, "did you mean `all-linear`"),
        ({"target_modules": "*_proj"}, "not a regular expression"),
        ({"init": "pissa", "quantization": {}}, "quantized"),
        ({"init": "orthogonal", "rank": 5}, "even rank"),
    ],
)
def test_what_cannot_work_is_refused_while_parsing(method: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        require(tiny.recipe(tmp_path, method=method))


def test_an_expression_never_reaches_the_output_head() -> None:
    model = adapted(tiny.method("lora", target_modules=r".*(q_proj|lm_head|mlp.*)"))
    found = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert found == {"q_proj", "gate_proj", "up_proj", "down_proj"}


def test_dora_keeps_the_norms_it_starts_from_and_moves_them(tmp_path: Path) -> None:
    method = tiny.method("dora")
    model = adapted(method)
    assert method.vitals(model, method.optimizer(model, OptimizerSpec()))["magnitude_change_mean"] == pytest.approx(
        0, abs=1e-6
    )
    record = train(tiny.recipe(tmp_path, "dora"))
    assert record["vitals"]["magnitude_change_mean"] > 1e-4


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the function of all of them took."""
    from ftune.ops import linear

    found: list[int] = []
    compute = linear.low_rank_linears

    def counted(x: torch.Tensor, layers: Any) -> Any:
        found.append(len(layers))
        return compute(x, layers)

    monkeypatch.setattr(linear, "low_rank_linears", counted)
    return found


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_neighbours_that_read_one_input_are_computed_together(name: str, products: list[int]) -> None:
    from ftune.methods._lean_low_rank import lean_low_rank

    plain, lean = (adapted(tiny.method(name)).train() for _ in range(2))
    for model in (plain, lean):
        tiny.disturb(model)
    lean_low_rank(lean)
    products.clear()
    expected, loss = loss_of(plain), loss_of(lean)
    assert products == [3, 1, 2, 1] * 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    expected.backward()
    loss.backward()
    for mine, other in zip(lean.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None and other.grad is not None:
            assert (mine.grad - other.grad).norm() <= 1e-5 * other.grad.norm()


def attention_of(model: Any, layer: int = 0) -> Any:
    return model.base_model.model.model.layers[layer].self_attn


def test_what_the_first_of_them_made_is_for_the_same_input_in_the_same_state_alone(products: list[int]) -> None:
    from ftune.methods._lean_low_rank import lean_low_rank

    model = adapted(tiny.method("lora")).train()
    tiny.disturb(model)
    x = torch.randn(1, 5, attention_of(model).q_proj.in_features)
    layers = [getattr(attention_of(model), name) for name in ("q_proj", "k_proj", "v_proj")]
    expected = [layer(x) for layer in layers]
    lean_low_rank(model)
    products.clear()
    for _ in range(2):  # as where a block is recomputed, whose input is the same tensor
        for layer, out in zip(layers, expected, strict=True):
            torch.testing.assert_close(layer(x), out)
    assert products == [3, 3]
    first, second, third = layers
    first(x)
    torch.testing.assert_close(second(2 * x), 2 * expected[1])  # another tensor
    x.mul_(2)
    torch.testing.assert_close(third(x), 2 * expected[2])  # changed in place
    with torch.no_grad():
        assert not first(x).requires_grad
    assert second(x).requires_grad
    assert products == [3, 3, 3, 1, 1, 3, 1]
    first(x)
    attention_of(model, 1).q_proj(x)  # what was left of others is gone
    second(x)
    assert products[-3:] == [3, 3, 1]


def test_layers_that_read_different_inputs_are_left_alone(products: list[int]) -> None:
    from ftune.methods._lean_low_rank import lean_low_rank

    model = adapted(tiny.method("lora")).train()
    for layer in range(2):
        attention_of(model, layer).k_proj.register_forward_pre_hook(lambda _, given: (given[0] + 0,))
    lean_low_rank(model)
    products.clear()
    loss_of(model)
    assert products == [2, 1, 1, 2, 1] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_without_a_norm_before_them_are_recomputed_the_same(checkpointing: bool) -> None:
    """OLMo 2's queries, keys and values read the block's own input, the same tensor when it is recomputed."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    from ftune.methods._lean import lean_base
    from ftune.methods._lean_low_rank import lean_low_rank

    config = Olmo2Config(
        vocab_size=len(tiny.tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

    def gradients(lean: bool, dtype: torch.dtype) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = tiny.method("lora").adapt(Olmo2ForCausalLM(config).to(dtype), tiny.context(dtype=dtype)).train()
        tiny.disturb(model)
        if lean:
            lean_base(model, dtype)
            assert lean_low_rank(model, dtype) == 14
            if checkpointing:
                enable_checkpointing(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss_of(model).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for mine, plain in zip(gradients(True, torch.float32), gradients(False, torch.float32), strict=True):
        assert (mine - plain).norm() <= 1e-5 * plain.norm()
    assert gradients(True, torch.bfloat16)


def test_dora_in_bfloat16_starts_as_its_base(tmp_path: Path) -> None:
    from ftune.run.objective import autocast

    base = tiny.model().bfloat16()
    with autocast(torch.bfloat16, "cpu"):
        expected = tiny.logits(base)
        actual = tiny.logits(tiny.method("dora").adapt(base, tiny.context(dtype=torch.bfloat16)))
    assert torch.equal(actual, expected)


def lean_dora() -> Any:
    from ftune.methods._lean_low_rank import lean_low_rank

    model = adapted(tiny.method("dora")).train()
    tiny.disturb(model)
    assert lean_low_rank(model) == 14
    return model


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The norms of every call that computed them."""
    from ftune.ops import linear

    found: list[torch.Tensor] = []
    compute = linear.direction_norms

    def counted(*given: Any) -> torch.Tensor:
        found.append(compute(*given))
        return found[-1]

    monkeypatch.setattr(linear, "direction_norms", counted)
    return found


def loss_of(model: Any, length: int = 20) -> torch.Tensor:
    loss: torch.Tensor = model(**tiny.batch(length=length), use_cache=False).logits.square().mean()
    return loss


def plain_norms(model: Any) -> list[torch.Tensor]:
    """By the definition, in the order of the layers."""
    return [
        torch.linalg.norm(
            m.get_base_layer().weight + m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight,
            dim=1,
        ).detach()
        for m in model.modules()
        if hasattr(m, "lora_A")
    ]


def kept_norms(model: Any) -> list[torch.Tensor]:
    from ftune.methods._lean_low_rank import _NORMS

    return [_NORMS[m].norms for m in model.modules() if hasattr(m, "lora_A")]


@pytest.mark.parametrize("how", ["plain", "foreach", "fused", "8-bit"])
def test_dora_computes_its_norms_once_an_update(how: str, computed: list[torch.Tensor]) -> None:
    model = lean_dora()
    enable_checkpointing(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any
    if how == "8-bit":
        optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(trained, lr=0.01)
    else:
        optimizer = torch.optim.AdamW(trained, lr=0.01, foreach=how == "foreach", fused=how == "fused")
    for update in range(1, 4):
        for length in (20, 30, 20):  # of which each is run twice
            loss_of(model, length).backward()
        assert len(computed) == 14 * update
        torch.testing.assert_close(kept_norms(model), plain_norms(model), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            loss_of(model)
        assert len(computed) == 14 * update
        before = plain_norms(model)
        optimizer.step()
        optimizer.zero_grad()
        assert not any(torch.equal(*pair) for pair in zip(before, plain_norms(model), strict=True))


def test_dora_s_norms_follow_whatever_changes_a_and_b(computed: list[torch.Tensor]) -> None:
    def loss(of: Any) -> Any:
        # fp32 matmuls of equal weights differ in the last bit where the memory is aligned otherwise; a push by 1e-3.
        return pytest.approx(loss_of(of).item(), rel=1e-5)

    model = lean_dora()
    first, start = loss_of(model).item(), copy.deepcopy(model.state_dict())
    tiny.disturb(model)
    assert loss(model) != first
    model.load_state_dict(start)
    assert loss_of(model).item() == first, "the same memory"
    twin = copy.deepcopy(model)
    assert loss(twin) == first
    assert len(computed) == 4 * 14
    tiny.disturb(twin)
    changed = loss_of(twin).item()
    assert loss(model) == first
    assert loss(model) != changed
    for name, parameter in list(twin.named_parameters()):
        if parameter.requires_grad:  # another parameter in its place
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(parameter.detach().clone()))
    assert loss(model) == changed
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model)
    assert len(computed) == 7 * 14


def test_dora_keeps_no_norms_of_parts_of_a_flat_tensor(computed: list[torch.Tensor]) -> None:
    """DeepSpeed's ZeRO-2 updates the whole of it, which no version of a part tells."""
    model = lean_dora()
    computed.clear()
    weights = [p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]
    flat = torch.cat([p.detach().flatten() for p in weights])
    for weight, part in zip(weights, flat.split([p.numel() for p in weights]), strict=True):
        weight.data = part.view(weight.shape)
    first, versions = loss_of(model), [p._version for p in weights]
    flat.mul_(1.5)
    assert loss_of(model) != first
    assert [p._version for p in weights] == versions
    assert len(computed) == 2 * 14


def test_vitals_tell_trained_from_untrained(tmp_path: Path) -> None:
    method = tiny.method("lora")
    model = adapted(method)
    assert method.vitals(model, method.optimizer(model, OptimizerSpec()))["lora_b_norm_mean"] == 0.0
    record = train(tiny.recipe(tmp_path))
    assert record["vitals"]["lora_b_norm_min"] > 0
    assert record["vitals"]["adapted_layers"] == 14
    assert RunDir(tmp_path / "run").read()["vitals"] == record["vitals"]
