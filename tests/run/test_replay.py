"""Micro-batches by recorded graphs: the same run as without, and as without where anything goes wrong.

A CUDA graph is emulated on the CPU by a tape of the operations that torch dispatches: recorded, what they made is
filled with nonsense; replayed, each is done again on the same tensors. What Python decides, it decides once, as with a
graph. On a GPU the graphs themselves run.
"""

from __future__ import annotations

import gc
import json
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from run.test_auto_batch import holds
from run.test_loop import assert_near, losses, weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.models.llama.modeling_llama import LlamaAttention

from ftune.artifacts import kernels, training
from ftune.artifacts.training import train
from ftune.methods import METHODS
from ftune.plan.recompute import blocks_of, enable_checkpointing
from ftune.recipe.load import Loaded
from ftune.run import block_graphs
from ftune.run.objective import Objective
from ftune.run.replay import Replay

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
REPLAYABLE = [name for name, method in METHODS.items() if method.replayable]


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """The operations of one recording."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, torch.Tensor] = {}
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func._schema.is_mutable:
            for x in given:
                if place(x) not in self.made:
                    self.before.setdefault(place(x), (x, x.detach().clone()))
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and place(x) not in map(place, given):
                self.made[place(x)] = x
        self.done.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        """Nothing has been computed yet."""
        for x, old in self.before.values():
            x.data.copy_(old)
        for x in self.made.values():
            x.data.fill_(float("nan") if x.is_floating_point() else 0)

    def again(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.done:
                # Without the counts of changes, which a graph does not keep either.
                args, kwargs = tree_map_only(torch.Tensor, lambda x: x.data, (args, kwargs))
                for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(out), strict=True):
                    if isinstance(old, torch.Tensor) and place(new) != place(old):
                        old.data.copy_(new)


class Waits(TorchDispatchMode):
    """Whether Python asked for a number."""

    any = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.any |= func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Tapes:
    """A recorder of the CPU."""

    def __init__(self, wait: float = 0.0) -> None:
        self.recorded, self._wait = 0, wait

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tape, random = Tape(), torch.get_rng_state()
        self.recorded += 1
        with tape:
            found = work()
        tape.undo()
        torch.set_rng_state(random)
        return found, tape.again

    def watch(self, work: Callable[[], Any]) -> tuple[Any, bool]:
        with Waits() as waits:
            found = work()
        return found, waits.any

    def wait(self) -> None:
        time.sleep(self._wait)

    def make_room(self) -> None:
        pass


def with_tapes(monkeypatch: pytest.MonkeyPatch, tapes: Any, always: bool = True) -> None:
    """Let runs replay on the CPU."""

    def replay_of(plan: Any, model: torch.nn.Module) -> tuple[Replay, str]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Replay(blocks_of(model), trained, tapes, plan.context.dtype, always=always), ""

    monkeypatch.setattr(training, "replay_of", replay_of)


def recipe(where: Path, kind: str = "lora", name: str = "run", **blocks: Any) -> Loaded:
    """Rows of one length, one in a micro-batch, so that all have one shape."""
    data = where / "alike.jsonl"
    if not data.exists():
        where.mkdir(parents=True, exist_ok=True)
        rows = [{"prompt": f"What is {i:02d}?", "completion": f"It is {i * 7 % 90:02d}."} for i in range(24)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {"max_steps": 5, "micro_batch_size": 1, "gradient_accumulation_steps": 2} | blocks.pop("training", {})
    return tiny.recipe(
        where,
        kind,
        data={"train": str(data), "packing": False},
        training=training,
        **{"checkpoint": {"every_steps": 5}} | blocks,
        output_dir=str(where / name),
    )


def graphs(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["lean"]["graphs"]
    return found


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", REPLAYABLE)
def test_the_same_run(name: str, recomputed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"training": {"gradient_checkpointing": recomputed}}
    train(recipe(tmp_path, name, "usual", **settings))
    tapes = Tapes()
    with_tapes(monkeypatch, tapes)
    train(recipe(tmp_path, name, "replayed", **settings))
    # Of ten micro-batches two as usual, one recorded, one more in that update, one compared.
    assert graphs(tmp_path / "replayed") == {"shapes": 1, "replayed_micro_batches": 5}
    assert tapes.recorded == 4  # two blocks, forwards and backwards
    assert_near(losses(tmp_path / "replayed"), losses(tmp_path / "usual"))
    assert_near(weights(tmp_path / "replayed", 5), weights(tmp_path / "usual", 5))


def test_the_same_run_in_16_bits_and_with_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "method": {"dropout": 0.1}}
    train(recipe(tmp_path, "lora", "usual", **settings))
    with_tapes(monkeypatch, Tapes())
    train(recipe(tmp_path, "lora", "replayed", **settings))
    assert graphs(tmp_path / "replayed") == {"shapes": 1, "replayed_micro_batches": 5}
    # Another mask would be off by more; under a mode of dispatch torch multiplies by other kernels.
    assert losses(tmp_path / "replayed") == pytest.approx(losses(tmp_path / "usual"), rel=1e-3)


def test_what_python_decides_anew_each_time_is_not_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that reads a number of the update in Python: recorded it keeps the one that it had."""
    forward, calls = Objective.forward, []

    def counting(self: Objective, batch: Any) -> Any:
        calls.append(batch)
        for block in blocks_of(self.model):
            block.self_attn.scaling = 0.25 + 0.1 * float(batch.input_ids.sum() % 7)
        return forward(self, batch)

    monkeypatch.setattr(Objective, "forward", counting)
    train(recipe(tmp_path, name="usual"))
    with_tapes(monkeypatch, Tapes())
    train(recipe(tmp_path, name="replayed"))
    found = graphs(tmp_path / "replayed")
    assert found["shapes"] == found["replayed_micro_batches"] == 0
    assert "gradients" in found["why_not"]
    assert losses(tmp_path / "replayed") == losses(tmp_path / "usual")


class Broken(Tapes):
    """Cannot record the ``bad``-th piece of work."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self._bad = bad

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.recorded == self._bad:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().record(work)


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_where_recording_fails_the_run_goes_on(bad: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe(tmp_path, name="usual"))
    with_tapes(monkeypatch, Broken(bad))
    train(recipe(tmp_path, name="replayed"))
    assert "not permitted" in graphs(tmp_path / "replayed")["why_not"]
    assert losses(tmp_path / "replayed") == losses(tmp_path / "usual")
    assert_near(weights(tmp_path / "replayed", 5), weights(tmp_path / "usual", 5))


def test_a_busy_gpu_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tapes = Tapes(wait=1.0)
    with_tapes(monkeypatch, tapes, always=False)
    train(recipe(tmp_path))
    assert tapes.recorded == 0
    assert "does not wait" in graphs(tmp_path / "run")["why_not"]


def test_where_memory_runs_out_beside_graphs_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe(tmp_path, name="usual"))
    forward, count = Objective.forward, 0

    def fails_once(self: Objective, batch: Any) -> Any:
        nonlocal count
        count += self.training
        if self.training and count == 11:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(Objective, "forward", fails_once)
    with_tapes(monkeypatch, Tapes())
    train(recipe(tmp_path, name="replayed"))
    assert "memory ran out" in graphs(tmp_path / "replayed")["why_not"]
    assert_near(weights(tmp_path / "replayed", 5), weights(tmp_path / "usual", 5))


def test_an_evaluation_that_graphs_leave_no_memory_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = {"evaluation": {"every_steps": 4}}
    train(recipe(tmp_path, name="usual", **evaluation))
    forward, kept = Objective.forward, weakref.WeakSet[Any]()
    made = block_graphs._Block.__init__

    def counted(self: Any, *args: Any) -> None:
        made(self, *args)
        kept.add(self)

    def beside_graphs(self: Objective, batch: Any) -> Any:
        if not self.training and kept:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(block_graphs._Block, "__init__", counted)
    monkeypatch.setattr(Objective, "forward", beside_graphs)
    with_tapes(monkeypatch, Tapes())
    gc.disable()  # memory is to be free at once
    try:
        train(recipe(tmp_path, name="replayed", **evaluation))
    finally:
        gc.enable()
    assert "memory ran out" in graphs(tmp_path / "replayed")["why_not"]
    evals = [[event["loss"] for event in tiny.events(tmp_path / run, "eval")] for run in ("usual", "replayed")]
    assert len(evals[0]) == 3, "before the first update, half-way, at the end"
    assert_near(*evals)


def test_halving_is_no_reason_to_go_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(monkeypatch, 1)
    with_tapes(monkeypatch, Tapes())
    training = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    train(recipe(tmp_path, model={"attention": "eager"}, training=training), auto_batch=True)
    assert "why_not" not in graphs(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"asked": False}, "is false"),
        ({"device": "cpu"}, "no CUDA device"),
        ({"world": 2}, "several processes"),
        ({"name": "full"}, "as large as the model"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_can_be_replayed(changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CudaRecorder", lambda device: Tapes())
    method = tiny.method(changes.get("name", "lora"))
    model = method.adapt(tiny.model(attention_dropout=changes.get("dropout", 0.0)), tiny.context())
    enable_checkpointing(model, 1)
    plan: Any = SimpleNamespace(
        recipe=SimpleNamespace(method=method, training=SimpleNamespace(cuda_graphs=changes.get("asked", "auto"))),
        context=SimpleNamespace(device=torch.device(changes.get("device", "cuda")), dtype=torch.bfloat16),
        world_size=changes.get("world", 1),
    )
    replay, said = kernels.replay_of(plan, model)
    assert (replay is None) is bool(why)
    assert why in said
    first, second = blocks_of(model)
    # The state of the random numbers cannot be asked for while a graph is recorded.
    keeps = first._gradient_checkpointing_func.keywords.get("preserve_rng_state", True)
    assert (first.gradient_checkpointing, second.gradient_checkpointing, keeps) == (True, False, bool(why))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_who_asks_for_graphs_hears_why_there_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(tmp_path, training={"cuda_graphs": True}))
    assert "note: blocks are not replayed from CUDA graphs: there is no CUDA device" in capsys.readouterr().err


def test_rows_of_another_shape_are_computed_as_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"model": {"attention": "eager"}, "training": {"max_steps": 7}}
    recipe(tmp_path)  # writes the rows
    rows = [json.loads(line) for line in (tmp_path / "alike.jsonl").read_text().splitlines()]
    for row in rows[::3]:
        row["prompt"] = row["prompt"] * 3
    (tmp_path / "alike.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(recipe(tmp_path, name="usual", **settings))
    with_tapes(monkeypatch, Tapes())
    train(recipe(tmp_path, name="replayed", **settings))
    found = graphs(tmp_path / "replayed")
    assert found["shapes"] == 2
    assert 0 < found["replayed_micro_batches"] < 10
    assert_near(losses(tmp_path / "replayed"), losses(tmp_path / "usual"))


def test_gradients_of_several_shapes_in_one_update_add_up() -> None:
    """One shape is recorded, then compared, in updates in which another one is replayed."""
    lora = tiny.method("lora", rank=4)
    model, usual = (lora.adapt(tiny.model(), tiny.context()) for _ in range(2))
    usual.load_state_dict(model.state_dict())
    tiny.disturb(usual)
    model.load_state_dict(usual.state_dict())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    replay = Replay(blocks_of(model), trained, Tapes(), torch.float32, always=True)

    def micro(of: torch.nn.Module, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
        def compute() -> torch.Tensor:
            loss: torch.Tensor = of(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            return loss.detach()

        return compute

    for module in (model, usual):
        module.train()
    lengths = [(8, 8), (8, 8), (8, 12), (8, 12), (12, 8), (8, 12), (12, 8), (8, 8, 12), (12,)]
    for step, update in enumerate(lengths):
        for index, length in enumerate(update):
            ids = torch.randint(0, 200, (1, length), generator=torch.Generator().manual_seed(10 * step + index))
            assert_near(replay.run(step, length, micro(model, ids)), micro(usual, ids)())
        for mine, theirs in zip(trained, (p for p in usual.parameters() if p.requires_grad), strict=True):
            assert mine.grad is not None
            assert_near(mine.grad, theirs.grad)
            mine.grad = theirs.grad = None
    assert replay.close() == {"shapes": 2, "replayed_micro_batches": 9}


@CUDA
@pytest.mark.parametrize(("packed", "recomputed"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", REPLAYABLE)
def test_on_a_gpu(name: str, packed: bool, recomputed: bool, tmp_path: Path) -> None:
    recipe(tmp_path)  # writes the rows
    found = {}
    for asked in (False, True):
        blocks: dict[str, Any] = {
            "data": {"train": str(tmp_path / "alike.jsonl"), "packing": packed, "max_length": 128},
            "training": {
                **{"max_steps": 10, "micro_batch_size": 1, "gradient_accumulation_steps": 1},
                **{"gradient_checkpointing": recomputed, "cuda_graphs": asked},
            },
            "model": {"dtype": "bfloat16"},
        }
        train(tiny.recipe(tmp_path, name, output_dir=str(tmp_path / f"run-{asked}"), **blocks))
        found[asked] = losses(tmp_path / f"run-{asked}")
    said = graphs(tmp_path / "run-True")
    assert "why_not" not in said
    assert said["replayed_micro_batches"] > 0
    assert found[True] == pytest.approx(found[False], rel=1e-2)


@pytest.mark.parametrize("gpu", [False, pytest.param(True, marks=CUDA)])
def test_a_block_that_waits_for_the_gpu_is_not_recorded(
    gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As experts do that count their tokens in Python."""
    forward, calls = LlamaAttention.forward, []

    def waits(self: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = forward(self, *args, **kwargs)
        calls.append(self.layer_idx)
        return out * float(out.isfinite().all()), weights

    monkeypatch.setattr(LlamaAttention, "forward", waits)
    tapes = Tapes()
    for asked in (False, True):
        if asked and not gpu:
            with_tapes(monkeypatch, tapes)
        settings = {"max_steps": 12, "cuda_graphs": asked}
        train(recipe(tmp_path, name=f"run-{asked}", training=settings, checkpoint={"every_steps": 12}))
    assert calls
    found = graphs(tmp_path / "run-True")
    assert found["replayed_micro_batches"] == tapes.recorded == 0
    assert "LlamaDecoderLayer waits" in found["why_not"]
    assert losses(tmp_path / "run-True") == pytest.approx(losses(tmp_path / "run-False"), rel=1e-2)
