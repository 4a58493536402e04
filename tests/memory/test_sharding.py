"""What a rank holds and sends, against figures worked out by hand on the published sizes of Llama."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoConfig

from ftune.available import on_empty_gpu
from ftune.errors import FtuneError
from ftune.memory.estimate import MemoryEstimate, estimate
from ftune.memory.request import Request
from ftune.memory.sharding import communication, on_host, per_rank
from ftune.methods import Method, ModelShape
from ftune.methods.full import Full
from ftune.methods.lora import Lora
from ftune.plan.devices import DEVICES, find_device
from ftune.plan.engine import EngineChoice
from ftune.plan.machine import Machine
from ftune.plan.resolve import resolve
from ftune.plan.shapes import read_shape
from ftune.plan.summary import summary_of
from ftune.plan.table import render_plan

SHAPES = Path(__file__).parents[2] / "ftune/shapes"
GIB = 2**30


def shape_of(name: str) -> ModelShape:
    return read_shape(AutoConfig.from_pretrained(SHAPES / name))


def request(method: Method, shape: ModelShape, engine: str, processes: int) -> Request:
    settings = {"length": 2048, "target_tokens": 2048, "recomputed_blocks": shape.layers}
    return tiny.request(method, shape, engine=engine, processes=processes, **settings)


def planned(method: Method, shape: ModelShape, engine: str, processes: int) -> MemoryEstimate:
    return estimate(request(method, shape, engine, processes))


# Llama-2-7B: 6,738,415,616 parameters; embedding and head 32000 x 4096 each, the last norm 4096: 262,148,096.
# One block: 4 x 4096^2 + 3 x 4096 x 11008 + 2 x 4096 = 202,383,360; 32 of them.
BLOCK, OUTSIDE = 202_383_360, 262_148_096
LORA_16 = 39_976_960  # 32 x 16 x (4 x 8192 + 3 x 15104)


def test_the_figures_by_hand_add_up_to_the_model() -> None:
    shape = shape_of("llama-2-7b")
    assert 32 * BLOCK + OUTSIDE == shape.parameters
    assert Lora(rank=16).trainable_parameters(shape) == LORA_16 == 32 * 16 * (4 * 8192 + 3 * 15104)


def test_one_process_holds_all_and_one_of_ddp_a_copy_of_the_gradients_too() -> None:
    shape = shape_of("llama-2-7b")
    alone = planned(Lora(rank=16), shape, "ddp", 1)
    shared, gradients = planned(Lora(rank=16), shape, "ddp", 8).as_dict(), 4 * LORA_16
    for item, size in alone.as_dict().items():
        assert shared[item] == size + (gradients if item in ("buffers", "total") else 0), item
    for engine in ("ddp", "fsdp2"):
        assert planned(Lora(rank=16), shape, engine, 1).as_dict() == alone.as_dict()


def test_lora_under_fsdp2_shares_out_the_blocks_and_keeps_its_adapters() -> None:
    shape = shape_of("llama-2-7b")
    alone, one = (planned(Lora(rank=16), shape, "fsdp2", n) for n in (1, 8))
    assert one.weights == 2 * (32 * BLOCK // 8 + OUTSIDE)
    assert one.buffers - alone.buffers == 2 * 2 * BLOCK  # two blocks of bf16, gathered
    kept = ("adapters", "gradients", "optimizer", "activations", "logits")
    assert [getattr(one, name) for name in kept] == [getattr(alone, name) for name in kept]
    assert one.optimizer == 8 * LORA_16


def test_offloaded_parts_are_on_the_host_and_not_on_the_device() -> None:
    shape, engine = shape_of("llama-2-7b"), "fsdp2-offload"
    sharded, one = (planned(Lora(rank=16), shape, name, 8) for name in ("fsdp2", engine))
    assert one.weights == 2 * OUTSIDE  # gathered from forward to backward pass
    assert sharded.total - one.total == 2 * 32 * BLOCK // 8
    assert on_host(request(Lora(rank=16), shape, engine, 8)) == 2 * (32 * BLOCK + OUTSIDE) // 8
    assert on_host(request(Lora(rank=16), shape, "fsdp2", 8)) == 0
    # Of a whole model in fp32 its gradients and two moments too.
    whole = planned(Full(), shape, engine, 8)
    assert (whole.gradients, whole.optimizer) == (0, 0)
    assert on_host(request(Full(), shape, engine, 8)) == 16 * shape.parameters // 8


def test_on_a_cpu_host_and_device_are_the_same(tmp_path: Path) -> None:
    items = {"weights": 10**6, "adapters": 0, "gradients": 10**6, "optimizer": 10**6, "buffers": 0}
    shape = read_shape(tiny.config())
    sharded, offloaded = (
        per_rank(items, replace(request(Full(), shape, engine, 2), device_type="cpu"))
        for engine in ("fsdp2", "fsdp2-offload")
    )
    assert offloaded == sharded
    recipe = tiny.recipe(tmp_path, "full").recipe
    here = summary_of(resolve(recipe, world_size=2, engine=EngineChoice("fsdp2-offload")))
    assert ("host_bytes" in here["ranks"]) == (here["device"]["type"] != "cpu")


@pytest.mark.parametrize(("engine", "refused"), [
    ("ddp", []),
    ("deepspeed-zero2", ["adamw_8bit"]),
    ("fsdp2-offload", ["adamw_8bit", "method: qlora"]),
])  # fmt: skip
def test_the_plan_does_not_advise_what_the_engine_refuses(engine: Any, refused: list[str], tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, "full", training={"gradient_checkpointing": False}).recipe
    settings: dict[str, Any] = {"sizes": SHAPES / "llama-2-7b", "machine": Machine.of(find_device("8GiB"))}
    advice = "\n".join(summary_of(resolve(recipe, world_size=8, engine=EngineChoice(engine), **settings))["advice"])
    for change in ("adamw_8bit", "method: qlora"):
        assert (change in advice) == (change not in refused)


def test_zero2_shares_out_gradients_and_moments_and_zero3_every_weight() -> None:
    shape, lora = shape_of("llama-2-7b"), Lora(rank=16)
    alone = planned(lora, shape, "ddp", 1)
    two, three = (planned(lora, shape, f"deepspeed-zero{stage}", 8) for stage in (2, 3))
    for one in (two, three):
        assert one.gradients == 4 * LORA_16 // 8
        assert one.optimizer == (8 + 4) * LORA_16 // 8  # two moments, and a copy in fp32
    assert (two.weights, two.adapters) == (alone.weights, alone.adapters)
    assert two.buffers - alone.buffers == 4 * 2**25  # the bucket in which gradients are reduced
    assert (three.weights, three.adapters) == (2 * (32 * BLOCK + OUTSIDE) // 8, 4 * LORA_16 // 8)
    # A block (larger than the embedding), and what is gathered ahead of it.
    assert three.buffers - two.buffers == 2 * BLOCK + 2 * 2**25


def test_what_deepspeed_sends() -> None:
    shape, lora = shape_of("llama-2-7b"), Lora(rank=16)
    gradients = 4 * LORA_16
    two, three = (sent(lora, shape, f"deepspeed-zero{stage}") for stage in (2, 3))
    # In each of four micro-batches; then what each rank updated.
    assert (two["all_reduce"], two["all_gather"]) == (4 * 2 * gradients * 7 // 8, gradients * 7 // 8)
    assert three["reduce_scatter"] == 4 * gradients * 7 // 8
    assert three["all_gather"] == 4 * 2 * (2 * (32 * BLOCK + OUTSIDE) + gradients) * 7 // 8


def test_full_fine_tuning_of_65b_fits_a_node_only_where_all_is_shared() -> None:
    shape = shape_of("llama-65b")
    assert shape.parameters == 65_285_660_672  # arXiv:2302.13971, table 2: 65.2B
    held = {engine: planned(Full(), shape, engine, 64) for engine in ("ddp", "fsdp2")}
    assert held["ddp"].weights == 4 * 65_285_660_672
    assert held["fsdp2"].optimizer == 8 * 65_285_660_672 // 64
    budget = find_device("h100-80g").memory
    assert [engine for engine in held if held[engine].total <= budget] == ["fsdp2"]


def sent(
    method: Method, shape: ModelShape, engine: str, *, accumulation: int = 4, processes: int = 8
) -> dict[str, int]:
    return communication(request(method, shape, engine, processes), accumulation)


def test_what_lora_sends_on_7b() -> None:
    shape, lora = shape_of("llama-2-7b"), Lora(rank=16)
    gradients = 4 * LORA_16
    assert sent(lora, shape, "ddp")["all_reduce"] == 2 * gradients * 7 // 8
    fsdp = sent(lora, shape, "fsdp2")
    assert fsdp["all_gather"] == 4 * 2 * (2 * 32 * BLOCK + OUTSIDE) * 7 // 8
    assert fsdp["all_reduce"] == 2 * gradients * 7 // 8
    assert fsdp["reduce_scatter"] == 0
    assert fsdp["total"] == sum(size for name, size in fsdp.items() if name != "total")
    assert sent(lora, shape, "fsdp2", processes=1)["total"] == 0


def test_full_fine_tuning_sends_three_times_the_model_but_for_one_gathering_of_what_is_outside_the_blocks() -> None:
    # ZeRO, arXiv:1910.02054, sec. 7.2.2: 3 Psi elements a step, where gradients are sent in the weights' dtype.
    shape = shape_of("llama-2-7b")
    found = sent(Full(), shape, "fsdp2", accumulation=1)
    assert found["total"] == pytest.approx(4 * (3 * shape.parameters - OUTSIDE) * 7 / 8, abs=3)
    # fully_shard reduces and scatters in the backward pass of every micro-batch.
    assert sent(Full(), shape, "fsdp2", accumulation=4)["reduce_scatter"] == pytest.approx(
        4 * 4 * shape.parameters * 7 / 8, abs=3
    )


def test_a_share_is_rounded_up() -> None:
    items = {"weights": 101, "adapters": 11, "gradients": 11, "optimizer": 23, "buffers": 0}
    shape = read_shape(tiny.config())
    found = per_rank(items, request(Full(), shape, "fsdp2", 4))
    assert (found["gradients"], found["optimizer"]) == (3, 6)


def test_devices_by_name_and_by_amount() -> None:
    assert find_device("H100-80G").memory == DEVICES["h100-80g"].mebibytes * 2**20
    assert find_device("24GiB").memory == 24 * GIB
    assert find_device("1.5 gb").memory == 1_500_000_000
    for wrong in ("h1000", "24", "0GiB", ""):
        with pytest.raises(FtuneError, match="no device that is known") as refused:
            find_device(wrong)
        assert "h100-80g" in str(refused.value.help)


@pytest.mark.parametrize(
    ("method", "engine", "through_host", "fits"),
    [
        ("lora", "fsdp2", True, True),
        ("lora", "fsdp2-offload", True, True),
        ("lora", "deepspeed-zero3", False, False),
        ("qlora", "fsdp2", False, True),  # 34 GiB whole
    ],
)
def test_what_is_too_large_for_one_device_goes_through_the_host_or_does_not_fit(
    method: str, engine: Any, through_host: bool, fits: bool, tmp_path: Path
) -> None:
    recipe = tiny.recipe(tmp_path, method, training={"max_steps": 2, "gradient_accumulation_steps": 1}).recipe
    target = find_device("h100-80g")
    plan = resolve(
        recipe, world_size=8, sizes=SHAPES / "llama-65b", engine=EngineChoice(engine), machine=Machine.of(target)
    )
    summary = summary_of(plan)
    # In bf16: 65,285,660,672 x 2 and more, of which an eighth or less stays.
    assert (plan.memory.loading > 2 * 65_285_660_672) == (method == "lora")
    assert (plan.through_host, plan.fits, summary["fits"]) == (through_host, fits, fits)
    assert plan.memory.total < target.memory, "once it is shared out"
    text = " ".join(render_plan(summary, 120).split())
    assert ("read through the host's memory" in text) == through_host
    assert ("does not fit while it loads" in text) == (not fits)
    assert ("--engine fsdp2 reads a base" in text) == (not fits)
    assert resolve(recipe, sizes=SHAPES / "llama-65b", machine=Machine.of(target)).memory.loading == 0


@pytest.mark.parametrize(("device", "dtype"), [("h100-80g", "bfloat16"), ("24GiB", "bfloat16"), ("t4-16g", "float32")])
def test_a_plan_for_another_device_is_in_that_device_s_dtype(device: str, dtype: str, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, model={"dtype": "auto"}, training={"max_steps": 2}).recipe
    assert summary_of(resolve(recipe, machine=Machine.of(find_device(device))))["model"]["dtype"] == dtype


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_says_who_holds_and_sends_what(width: int, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, training={"max_steps": 2, "gradient_accumulation_steps": 1}).recipe
    target = find_device("h100-80g")
    plan = resolve(
        recipe, world_size=8, sizes=SHAPES / "llama-2-7b", engine=EngineChoice("fsdp2"), machine=Machine.of(target)
    )
    summary = summary_of(plan)
    assert summary["device"] == {"type": "cuda", "name": "h100-80g", "available": on_empty_gpu(target.memory)}
    assert summary["fits"]
    assert summary["ranks"]["engine"] == "fsdp2"
    text = render_plan(summary, width)
    ours = [line for line in text.splitlines() if str(tmp_path) not in line and str(SHAPES) not in line]
    assert max(map(len, ours)) <= width
    assert "8 of fsdp2" in text
    assert "all-gather" in text
    assert "ranks" not in summary_of(resolve(recipe))
