from __future__ import annotations

import math
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import torch
from architectures import DENSE, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ftune.available import available_bytes
from ftune.human import bytes_text
from ftune.memory.advice import MARGIN, what_to_change
from ftune.memory.estimate import MemoryEstimate, estimate
from ftune.memory.request import stored_bytes
from ftune.methods import METHODS, ModelShape
from ftune.plan.devices import find_device
from ftune.plan.lean import PER_DOCUMENT, make_lean
from ftune.plan.machine import Machine
from ftune.plan.recompute import blocks_of
from ftune.plan.resolve import resolve
from ftune.plan.shapes import read_shape
from ftune.plan.summary import summary_of
from ftune.recipe.load import parse_recipe

SHAPES = Path(__file__).parents[2] / "ftune" / "shapes"
GIB = 2**30


def shape_named(name: str) -> ModelShape:
    return read_shape(AutoConfig.from_pretrained(SHAPES / name))


def estimated(method: str = "lora", shape: ModelShape | None = None, **changes: Any) -> MemoryEstimate:
    changes = {"target_tokens": 512} | changes
    return estimate(tiny.request(METHODS[method](), shape or shape_named("smollm2-135m"), **changes))


# --- activations against what autograd keeps -------------------------------------------------------------

TOKENS = 509


def kept_by_autograd(config: PreTrainedConfig, name: str, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that a forward pass keeps for the backward pass beside parameters; and those of masks among them."""
    attention = attention_of(config)
    method = tiny.method(name)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=method.base_dtype(dtype), attn_implementation=method.attention(attention)
    )
    context = tiny.context(total_steps=9, dtype=dtype, max_length=TOKENS, row_lengths=[TOKENS])
    model = method.adapt(model, context).train()
    found = make_lean(model, method, context, attention)
    inputs = {"input_ids": torch.randint(3, 128, (1, TOKENS)), "use_cache": False}
    if method.packable and attention == "sdpa":
        inputs["position_ids"] = (torch.arange(TOKENS) % 300)[None]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in known:
            kept.setdefault(address, tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(**inputs, logits_to_keep=1)
    masks = [t for t in kept.values() if t.ndim == 4 and t.shape[1] == 1 and t.shape[-1] >= t.shape[-2]]
    # CUDA's kernels, which are what is predicted here, keep one fp32 number for each query and head.
    fused = found["attention"] == PER_DOCUMENT
    logsumexps = 4 * TOKENS * config.num_attention_heads * config.num_hidden_layers if fused else 0
    return (
        sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + logsumexps,
        sum(tensor.untyped_storage().nbytes() for tensor in masks),
    )


def attention_of(config: PreTrainedConfig) -> str:
    return "eager" if config.model_type == "gemma2" else "sdpa"  # which caps its scores


def ratio(config: PreTrainedConfig, name: str, dtype: torch.dtype) -> float:
    """What is predicted to be kept over what is."""
    attention = attention_of(config)
    method = tiny.method(name)
    shape = read_shape(config)
    packed = method.packable and attention == "sdpa"
    request = tiny.request(
        method, shape, dtype_bytes=dtype.itemsize, length=TOKENS, attention=attention, packed=packed
    )  # on CUDA: without a heap
    prediction = estimate(request)
    kept, masks = kept_by_autograd(config, name, dtype)
    predicted_masks = shape.layers * method.mask_cells(TOKENS + method.virtual_positions, packed) * dtype.itemsize
    assert predicted_masks == pytest.approx(masks, rel=0.1)
    return (prediction.activations + predicted_masks) / kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_what_is_predicted(name: str, dtype: torch.dtype) -> None:
    # The first block keeps little under methods that train behind its attention: one in eight here, fewer in use.
    config = tiny_config("llama", num_hidden_layers=8)
    assert ratio(config, name, dtype) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", METHODS)
def test_the_inputs_that_recomputed_blocks_keep_are_as_wide_as_predicted(name: str) -> None:
    method, dtype = tiny.method(name), torch.bfloat16
    base = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=method.base_dtype(dtype))
    model: Any = method.adapt(base, tiny.context(total_steps=9, dtype=dtype)).train()
    widths = []
    for block in blocks_of(model):
        block.register_forward_pre_hook(lambda _, given: widths.append(given[0].dtype.itemsize))
    with torch.autocast("cpu", dtype):
        model(input_ids=torch.arange(3, 12)[None], use_cache=False)
    assert set(widths) == {method.stream_bytes(stored_bytes(method, dtype.itemsize))}


# Of fused query, key and value projections gpt_neox keeps one tensor where three are counted, phi3 all for the values.
TOLERANCE = {"gpt_neox": 0.25, "phi3": 0.15}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("architecture", DENSE)
def test_every_architecture_keeps_what_is_predicted(architecture: str, name: str, dtype: torch.dtype) -> None:
    assert ratio(tiny_config(architecture), name, dtype) == pytest.approx(1, abs=TOLERANCE.get(architecture, 0.13))


# --- the items --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_items_are_bytes_and_sum_to_the_total(method: str, device_type: str, checkpointing: bool) -> None:
    items = estimated(method, device_type=device_type, recomputed_blocks=30 * checkpointing).as_dict()
    total = items.pop("total")
    assert list(items) == [
        *("weights", "adapters", "gradients", "optimizer", "activations", "logits", "buffers", "runtime")
    ]
    assert all(type(value) is int and value >= 0 for value in items.values())
    assert total == sum(items.values())


def test_full_keeps_fp32_weights_gradients_and_two_moments() -> None:
    items = estimated("full")
    parameters = 134_515_008
    assert items.weights == items.gradients == 4 * parameters
    assert items.optimizer == 8 * parameters
    assert items.adapters == 0


def test_lora_keeps_gradients_for_the_adapter_alone() -> None:
    items = estimated("lora")
    assert items.weights == 2 * 134_515_008
    assert items.adapters == items.gradients == items.optimizer // 2 == 4 * 4_884_480


def test_four_bit_weights_take_about_a_quarter_and_a_dequantized_matrix() -> None:
    shape = shape_named("llama-2-7b")
    # with so few targets that the peak is the backward pass of a block, not the loss
    plain, quantized = (estimated(name, shape, target_tokens=64) for name in ("lora", "qlora"))
    assert 0.25 < quantized.weights / plain.weights < 0.32
    assert quantized.buffers - plain.buffers == 2 * 4096 * 11008


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"rows": 2}, {"rows": 4}),
        ({"length": 2048}, {"length": 4096}),
        ({"optimizer": "adamw_8bit"}, {"optimizer": "adamw"}),
        ({"attention": "sdpa"}, {"attention": "eager"}),
    ],
    ids=lambda value: "-".join(f"{key}={item}" for key, item in value.items()),
)
def test_more_of_anything_takes_more(
    method: str, checkpointing: bool, less: dict[str, Any], more: dict[str, Any]
) -> None:
    common = {"recomputed_blocks": 30 * checkpointing, "device_type": "cpu", "length": 4096}
    assert estimated(method, **common | less).total < estimated(method, **common | more).total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3-8b"])
def test_checkpointing_saves_activations(method: str, name: str) -> None:
    shape = shape_named(name)
    plain, checkpointed = (
        estimated(method, shape, recomputed_blocks=blocks, device_type="cpu") for blocks in (0, shape.layers)
    )
    assert checkpointed.activations < plain.activations / 4
    assert checkpointed.total < plain.total


def test_the_update_of_everything_may_be_the_peak_on_cuda() -> None:
    # torch's AdamW works on all parameters at once there, through one temporary of their size
    items = estimated("full", shape_named("llama-2-7b"), recomputed_blocks=32, target_tokens=1)
    assert (items.activations, items.logits, items.buffers) == (0, 0, 4 * 6_738_415_616)


def test_documents_need_no_mask_but_under_eager_attention() -> None:
    for kind, masks in (("sdpa", 0), ("flash_attention_2", 0), ("eager", 30)):
        apart, alone = (estimated(packed=packed, attention=kind).buffers for packed in (True, False))
        assert apart - alone == masks * 1024**2 * 2


# A chunk has 32 MiB of fp32 logits on the CPU and 512 MiB on CUDA; where the head trains, at least one in V / D.
@pytest.mark.parametrize(
    ("device_type", "method", "positions", "chunk"),
    [
        ("cpu", "lora", 64, 64),
        ("cpu", "lora", 16384, 168),
        ("cpu", "full", 16384, 192),
        ("cuda", "lora", 64, 64),
        ("cuda", "lora", 16384, 2728),
        ("cuda", "full", 16384, 2728),
    ],
)
def test_the_loss_takes_one_chunk_of_positions(device_type: str, method: str, positions: int, chunk: int) -> None:
    # under plain AdamW the peak of full fine-tuning on CUDA is the update
    settings = {"recomputed_blocks": 30, "length": 32, "optimizer": "adamw_8bit"}
    items = estimated(method, target_tokens=positions, device_type=device_type, **settings)
    # in bf16, and beside them in fp32 where no kernel puts the gradient in their place
    assert items.logits == chunk * 49152 * (2 if device_type == "cuda" else 6) + positions * 2 * 2 * 576


def test_a_trained_head_gets_its_gradient_with_the_loss() -> None:
    embedding = 49152 * 576
    items = estimated("full", recomputed_blocks=30, length=8, target_tokens=8, optimizer="adamw_8bit")
    assert items.buffers == 8 * embedding


def test_padded_rows_need_no_mask() -> None:
    copies = METHODS["lora"]().saved_bytes(shape_named("smollm2-135m"), 2)  # of A and B, whatever the rows
    one, four = (estimated("lora", rows=rows, target_tokens=512).activations - copies for rows in (1, 4))
    assert four == 4 * one
    # what one feed-forward's backward pass takes, and no mask
    assert estimated("lora", rows=4, target_tokens=64).buffers == 4 * (4 * 1024 * 1536 * 2)


def test_a_short_window_needs_a_mask() -> None:
    shape = shape_named("mistral-7b")
    inside, beyond = (estimated(shape=shape, length=length).buffers for length in (4096, 4097))
    assert beyond - inside == pytest.approx(32 * 4097**2 * 2, rel=1e-3)


def test_dropout_of_attention_has_no_fused_kernel_on_the_cpu() -> None:
    with_dropout = read_shape(tiny_config("gpt2", attn_pdrop=0.1))
    without = read_shape(tiny_config("gpt2"))
    pair = [estimated(shape=shape, device_type="cpu") for shape in (with_dropout, without)]
    assert pair[0].activations - pair[1].activations == 12 * 3 * 4 * 1024**2
    pair = [estimated(shape=shape, device_type="cuda") for shape in (with_dropout, without)]
    assert pair[0] == pair[1]


# --- advice -----------------------------------------------------------------------------------------------


def recipe(max_length: int = 1024, accumulation: int = 2) -> Any:
    return SimpleNamespace(
        data=SimpleNamespace(max_length=max_length),
        training=SimpleNamespace(accumulation=accumulation),
    )


def test_no_advice_when_it_fits() -> None:
    prediction = estimated()
    assert what_to_change(prediction, math.ceil(prediction.total / (1 - MARGIN)) + 1, recipe()) == []


def test_a_fit_by_less_than_a_plan_may_be_wrong_is_none() -> None:
    prediction = estimated()
    lines = what_to_change(prediction, prediction.total + 14 * 2**20, recipe())
    assert lines[0].startswith("training.gradient_checkpointing: true: saves")
    assert lines[0].endswith(", fits")
    assert lines[-1].startswith("--set training.gradient_checkpointing=true: needs")


def test_each_advice_is_true() -> None:
    shape = shape_named("llama-3-8b")
    prediction = estimated("lora", shape, rows=4, target_tokens=2048)
    lines = what_to_change(prediction, 12 * GIB, recipe())
    again: dict[str, Any] = {
        "training.gradient_checkpointing: true": {"recomputed_blocks": 32},
        "training.micro_batch_size: 1 with gradient_accumulation_steps: 8": {"rows": 1, "target_tokens": 512},
        "method.quantization: {type: nf4}": {"method": "qlora"},
        "data.max_length: 512": {"length": 512, "target_tokens": 1024},
    }
    assert [line.split(": saves")[0] for line in lines[:-1]] == list(again), "the least harmful first"
    for line in lines[:-1]:
        change = {"method": "lora", "rows": 4, "target_tokens": 2048} | again[line.split(": saves")[0]]
        changed = estimated(change.pop("method"), shape, **change)
        assert f"saves {bytes_text(prediction.total - changed.total)}" in line
        assert line.endswith("fits" if changed.total <= 12 * GIB else f"needs {bytes_text(changed.total)}")
    together = estimated("qlora", shape, rows=4, target_tokens=2048, recomputed_blocks=32)
    assert lines[-1] == (
        "--set training.gradient_checkpointing=true --set 'method.quantization={type: nf4}': "
        f"needs {bytes_text(together.total)}, fits"
    )


def test_a_base_in_fp32_is_told_of_bfloat16_and_of_4_bits() -> None:
    shape = shape_named("llama-3-8b")
    for device, said in (("cpu", ", slower on a CPU without bfloat16"), ("cuda", "")):
        prediction = estimated("lora", shape, dtype_bytes=4, device_type=device, recomputed_blocks=32)
        lines = what_to_change(prediction, 8 * GIB, recipe())
        assert lines[0].startswith(f"model.dtype: bfloat16{said}: saves")
        assert lines[-1].startswith("--set model.dtype=bfloat16 --set 'method.quantization={type: nf4}': needs")
        assert lines[-1].endswith(", fits")
    full = estimated("full", shape, dtype_bytes=4, recomputed_blocks=32)
    assert what_to_change(full, 9 * GIB, recipe())[-1].startswith(
        "--set model.dtype=bfloat16 --set method=qlora: needs"
    )


def test_what_is_to_be_copied_is_taken_as_it_stands(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, "galore", optimizer={"name": "adamw_8bit"})
    plan = resolve(loaded.recipe, sizes=SHAPES / "llama-3-8b", machine=Machine.of(find_device("28GiB")))
    options = shlex.split(summary_of(plan)["advice"][-1].partition(": needs")[0])
    assert "method.per_layer=true" in options
    again = parse_recipe(loaded.text, "recipe.yaml", options[1::2]).recipe
    fitting = resolve(again, sizes=SHAPES / "llama-3-8b", machine=Machine.of(find_device("28GiB")))
    assert fitting.fits
    assert not fitting.tight


def test_of_rows_behind_each_other_as_few_are_advised_at_once_as_fit() -> None:
    shape = shape_named("llama-3-8b")
    prediction = estimated("qlora", shape, length=16384, target_tokens=8192, longest=512)
    least = estimated("qlora", shape, length=512, target_tokens=256, longest=512)
    some = estimated("qlora", shape, length=4096, target_tokens=2048, longest=512)

    def enough(needed: int) -> int:
        return math.ceil(needed / (1 - MARGIN))

    def advised(available: int) -> str:
        lines = what_to_change(prediction, available, recipe(max_length=512))
        assert not any("max_length" in line for line in lines)  # rows are shorter than what is computed at once
        (line,) = [line for line in lines if line.startswith("training.micro_batch_tokens")]
        return line

    saved = bytes_text(prediction.total - some.total)
    assert (
        advised(enough(some.total))
        == f"training.micro_batch_tokens: 4096, which changes no result: saves {saved}, fits"
    )
    assert advised(enough(some.total) - 2).startswith("training.micro_batch_tokens: 2048")
    assert advised(least.total - 1).startswith("training.micro_batch_tokens: 512, which changes no result: saves")
    assert advised(least.total - 1).endswith(f"then needs {bytes_text(least.total)}")


def test_a_window_is_held_against_the_longest_row_not_against_what_is_computed_at_once() -> None:
    shape = shape_named("mistral-7b")
    window = shape.extra["sliding_window"]
    rows = estimated("lora", shape, rows=4, length=window, target_tokens=99)
    one = estimated("lora", shape, length=4 * window, target_tokens=99, longest=window)
    assert one.total == rows.total
    assert estimated("lora", shape, length=4 * window, target_tokens=99).buffers > one.buffers


def test_full_is_told_of_smaller_states_and_of_qlora() -> None:
    prediction = estimated("full", shape_named("llama-2-7b"), recomputed_blocks=32)
    lines = what_to_change(prediction, 80 * GIB, recipe())
    assert [line.split(": saves")[0] for line in lines[:2]] == ["optimizer.name: adamw_8bit", "method: qlora"]
    assert lines[1].endswith("fits")
    assert lines[-1].startswith("--set optimizer.name=adamw_8bit: needs") or "method=qlora" in lines[-1]


def test_a_model_that_cannot_fit_says_so() -> None:
    prediction = estimated("qlora", shape_named("llama-3-8b"), recomputed_blocks=32)
    lines = what_to_change(prediction, 2 * GIB, recipe(max_length=128))
    assert lines[-1].startswith("no change to the recipe is enough (all of it together still needs ")
    assert lines[-1].endswith("take a smaller model or a larger device")


# --- what there is ----------------------------------------------------------------------------------------


def own_size() -> int:
    return int(psutil.Process().memory_info().rss)


def group(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text + "\n")


def test_a_container_limit_binds(tmp_path: Path) -> None:
    group(tmp_path / "a", memory__max="400", memory__current="150", memory__stat="inactive_file 50\nanon 100")
    group(tmp_path / "a/b", memory__max="max", memory__current="100", memory__stat="inactive_file 0")
    (tmp_path / "own").write_text("0::/a/b\n")
    left = available_bytes("cpu", cgroup_root=tmp_path, cgroup_file=tmp_path / "own")
    # the parent's limit, less what is used, plus the cache it can drop; the process's own size comes on top
    assert left - 300 == pytest.approx(own_size(), rel=0.05)


def test_the_first_version_of_control_groups_binds_too(tmp_path: Path) -> None:
    group(
        tmp_path / "memory" / "job",
        memory__limit_in_bytes="1000",
        memory__usage_in_bytes="700",
        memory__stat="total_inactive_file 25",
    )
    (tmp_path / "own").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    left = available_bytes("cpu", cgroup_root=tmp_path, cgroup_file=tmp_path / "own")
    assert left - 325 == pytest.approx(own_size(), rel=0.05)


def test_inside_a_container_the_own_path_may_be_missing(tmp_path: Path) -> None:
    group(tmp_path, memory__max="400", memory__current="100", memory__stat="inactive_file 0")
    (tmp_path / "own").write_text("0::/somewhere/else\n")
    left = available_bytes("cpu", cgroup_root=tmp_path, cgroup_file=tmp_path / "own")
    assert left - 300 == pytest.approx(own_size(), rel=0.05)


def test_without_a_limit_the_system_decides(tmp_path: Path) -> None:
    left = available_bytes("cpu", cgroup_root=tmp_path, cgroup_file=tmp_path / "missing")
    assert left == pytest.approx(psutil.virtual_memory().available + own_size(), rel=0.2)
