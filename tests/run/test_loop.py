"""The loop's promises: one batch gives one gradient however it is split, and a resumed run is the same run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from ftune.artifacts import objective, training
from ftune.artifacts.training import train
from ftune.data.batches import collate
from ftune.data.tokenize import Example
from ftune.errors import DataError, Interrupted, ModelError, RunDirError, RunFailed
from ftune.methods import METHODS
from ftune.plan.documents import apart, packing_error
from ftune.recipe.load import Loaded
from ftune.run.events import StepEnd
from ftune.run.loop import Loop
from ftune.run.objective import Objective

EVERY = pytest.mark.parametrize("name", METHODS)


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step}" / "trained.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_near(a: Any, b: Any) -> None:
    """Hold that tensors, however nested, are apart by a ten-thousandth of their size at most."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_near(a[key], b[key])
    elif isinstance(a, list | tuple):
        for pair in zip(a, b, strict=True):
            assert_near(*pair)
    elif isinstance(a, torch.Tensor):
        assert (a - b).norm() <= 1e-4 * b.norm()
    else:
        assert a == b


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in tiny.events(run, "step")]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send SIGTERM to this process when the update ``step`` is done."""
    emit = training.Tally.receive

    def receive(self: Any, event: Any) -> None:
        emit(self, event)
        if isinstance(event, StepEnd) and event.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.Tally, "receive", receive)


def train_until(loaded: Loaded, step: int) -> None:
    """Train a recipe, interrupted when the update ``step`` is done."""
    with pytest.MonkeyPatch.context() as patched:
        stop_after(patched, step)
        with pytest.raises(Interrupted):
            train(loaded)


@EVERY
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Dropout makes the run depend on random state; two epochs, so that the order of the data matters.
    dropout = {"dropout": 0.1} if "dropout" in METHODS[name].model_fields else {}
    length = {"training": {"max_steps": 6, "gradient_accumulation_steps": 3}, "method": dropout}
    whole = tiny.recipe(tmp_path, name, output_dir=str(tmp_path / "whole"), **length)
    train(whole)
    parts = tiny.recipe(tmp_path, name, output_dir=str(tmp_path / "parts"), **length)
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Interrupted) as stopped:
            train(parts)
    assert stopped.value.exit_code == 143
    assert "--resume" in (stopped.value.help or "")
    assert json.loads((tmp_path / "parts/run.json").read_text())["status"] == "interrupted"
    train(parts, resume=True)
    trained = [weights(tmp_path / run, 6) for run in ("whole", "parts")]
    optimizers = [
        torch.load(tmp_path / run / "checkpoints/step-6/optimizer.pt", weights_only=True) for run in ("whole", "parts")
    ]
    if name == "prefix" and torch.cuda.is_available():
        # Behind a prefix attention takes a mask, and with a mask the kernel whose backward pass adds what blocks of
        # keys contribute in the order in which they are done: not even two whole runs are equal to the last bit.
        assert_near(*trained)
        assert_near(*optimizers)
        assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-4)
        return
    assert_equal(*trained)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    torch.testing.assert_close(optimizers[0], optimizers[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lora", "adalora", "galore"])
def test_a_paused_run_is_evaluated_and_goes_on_to_the_same_end(name: str, tmp_path: Path) -> None:
    length = {"training": {"max_steps": 6, "gradient_accumulation_steps": 3}}
    train(tiny.recipe(tmp_path, name, output_dir=str(tmp_path / "whole"), **length))
    run = tmp_path / "parts"
    parts = tiny.recipe(tmp_path, name, output_dir=str(run), **length)
    assert train(parts, until=2)["status"] == "paused"
    assert not (run / METHODS[name].artifact).exists()
    # As if killed between the checkpoint and its evaluation.
    lines = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if not (json.loads(line)["event"] == "eval" and json.loads(line)["step"] == 2)]
    assert len(kept) == len(lines) - 1
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    for until in (2, 3):
        assert train(parts, resume=True, until=until)["measured"]["steps"] == until
        assert [event["step"] for event in tiny.events(run, "eval")][-1] == until
    assert train(parts, resume=True)["status"] == "finished"
    assert_equal(*(weights(path, 6) for path in (tmp_path / "whole", run)))
    assert losses(tmp_path / "whole") == losses(run)


@pytest.mark.parametrize("packing", [True, False])
@EVERY
def test_micro_batches_and_accumulation_give_one_result(name: str, packing: bool, tmp_path: Path) -> None:
    if packing and not METHODS[name].packable:
        pytest.skip("this method cannot be packed")
    results = []
    for size, accumulation in ((8, 1), (4, 2), (1, 8)):
        run = tmp_path / f"{size}x{accumulation}"
        loaded = tiny.recipe(
            tmp_path,
            name,
            data={"packing": packing},
            # The first update is compared; AdaLoRA needs three to have its phases.
            training={"max_steps": 3, "micro_batch_size": size, "gradient_accumulation_steps": accumulation},
            output_dir=str(run),
        )
        train(loaded)
        step = tiny.events(run, "step")[0]
        results.append((step["loss"], step["grad_norm"], step["target_tokens"]))
    for loss, norm, targets in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert norm == pytest.approx(results[0][1], rel=1e-6)
        assert targets == results[0][2]


def gradient(objective: Objective, rows: list[list[Example]]) -> tuple[float, list[torch.Tensor]]:
    objective.zero_grad()
    loss = objective(collate(rows, 0))
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in objective.parameters() if p.grad is not None]


def test_packed_equals_separate() -> None:
    import numpy as np

    random = np.random.default_rng(0)
    documents = []
    for row, length in enumerate((5, 9, 3, 7)):
        ids = random.integers(3, 200, length).astype(np.int32)
        labels = ids.copy()
        labels[: length // 2] = -100
        documents.append(Example(ids, labels, row))
    objective = Objective(tiny.model().train(), torch.float32)
    alone = [gradient(objective, [[document]]) for document in documents]
    expected = sum(loss for loss, _ in alone)
    for rows in ([documents], [documents[:2], documents[2:]], [[d] for d in documents]):
        loss, grads = gradient(objective, rows)
        assert loss == pytest.approx(expected, rel=1e-5)
        for index, grad in enumerate(grads):
            together = sum(parts[index] for _, parts in alone)
            assert (grad - together).norm() <= 1e-5 * together.norm()


def test_objective_equals_the_models_own_loss() -> None:
    model = tiny.model().train()
    ids = tiny.batch(rows=1, length=20)["input_ids"]
    labels = ids.clone()
    labels[:, :8] = -100
    expected = model(input_ids=ids, labels=labels, use_cache=False).loss * 12
    example = Example(ids[0].numpy().astype("int32"), labels[0].numpy().astype("int32"), 0)
    actual = Objective(model, torch.float32)(collate([[example]], 0))
    assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_a_batch_without_targets_has_loss_zero_and_a_graph() -> None:
    loss = Objective(tiny.model().train(), torch.float32)(collate([], 0))
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_a_parameter_that_cannot_move_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(plan: Any) -> Any:
        model, optimizer = training_build(plan)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # An optimizer that forgets one matrix is the commonest way to train in name only.
        optimizer.param_groups[0]["params"] = parameters[1:]
        return model, optimizer

    training_build = training.build
    monkeypatch.setattr(training, "build", build)
    with pytest.raises(RunFailed, match=r"did not move in \d update") as failed:
        train(tiny.recipe(tmp_path))
    assert failed.value.exit_code == 1
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "failed"
    assert "did not move" in record["error"]


def test_a_loss_that_is_not_finite_names_step_and_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Objective.forward
    monkeypatch.setattr(Objective, "forward", lambda self, batch: forward(self, batch) * float("nan"))
    with pytest.raises(RunFailed, match=r"step 1, rows \[\d+, \d+\]"):
        train(tiny.recipe(tmp_path, data={"packing": False}))


def test_checkpoints_rotate_and_appear_whole(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, checkpoint={"every_steps": 1, "keep": 2}))
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-3", "step-4"]
    assert [event["path"] for event in tiny.events(tmp_path / "run", "saved")][:2] == ["step-1", "step-2"]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = tiny.recipe(tmp_path, checkpoint={"every_steps": 1})
    train_until(loaded, 3)
    expected = tmp_path / "run/checkpoints/step-3/trained.safetensors"
    damaged = bytearray(expected.read_bytes())
    damaged[-1] ^= 1
    expected.write_bytes(damaged)
    train(loaded, resume=True)
    assert tiny.events(tmp_path / "run", "resume")[0]["checkpoint"] == "step-2"
    assert "trained.safetensors does not match its checksum" in capsys.readouterr().err
    assert [event["step"] for event in tiny.events(tmp_path / "run", "step")] == [1, 2, 3, 4]


def test_a_save_that_dies_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftune.run import checkpoint

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(RunFailed, match="no space"):
        train(tiny.recipe(tmp_path))
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


class TestRunDirectory:
    def test_refuses_to_overwrite(self, tmp_path: Path) -> None:
        loaded = tiny.recipe(tmp_path, training={"max_steps": 2})
        train(loaded)
        with pytest.raises(RunDirError, match="already holds a run"):
            train(loaded)
        train(loaded, overwrite=True)

    def test_a_recipe_that_cannot_run_costs_nothing(self, tmp_path: Path) -> None:
        train(tiny.recipe(tmp_path))
        before = (tmp_path / "run/run.json").read_text()
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write("not json\n")
        with pytest.raises(DataError):
            train(tiny.recipe(tmp_path), overwrite=True)
        assert (tmp_path / "run/run.json").read_text() == before
        assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()

    def test_what_a_killed_rehearsal_left_is_swept_away(self, tmp_path: Path) -> None:
        (tmp_path / "run/.tmp-rehearsal-x").mkdir(parents=True)
        os.utime(tmp_path / "run/.tmp-rehearsal-x", (0, 0))
        train(tiny.recipe(tmp_path))
        assert not (tmp_path / "run/.tmp-rehearsal-x").exists()

    def test_another_number_of_steps_is_another_run(self, tmp_path: Path, monkeypatch: Any) -> None:
        with monkeypatch.context() as patched:
            stop_after(patched, 1)
            with pytest.raises(Interrupted):
                train(tiny.recipe(tmp_path))
        record = tmp_path / "run/run.json"
        data = json.loads(record.read_text())
        data["plan"]["training"] |= {"steps": 2}
        record.write_text(json.dumps(data))
        with pytest.raises(RunDirError, match="steps in all: 2 then, 4 now"):
            train(tiny.recipe(tmp_path), resume=True)

    def test_tensorboard_gets_the_numbers(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        train(tiny.recipe(tmp_path, tracking=["jsonl", "tensorboard"]))
        found = [path.parent for path in (tmp_path / "run/tracking").rglob("events.*")]
        scalars = {tag for where in found for tag in EventAccumulator(str(where)).Reload().Tags()["scalars"]}
        assert {"train/loss", "eval/loss"} <= scalars

    def test_never_deletes_what_is_not_its_own(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/thesis.txt").write_text("dear")
        with pytest.raises(RunDirError, match="not empty"):
            train(tiny.recipe(tmp_path), overwrite=True)
        assert (tmp_path / "run/thesis.txt").read_text() == "dear"

    @pytest.mark.parametrize("changed", ["recipe", "data"])
    def test_resuming_another_run_is_refused(self, changed: str, tmp_path: Path, monkeypatch: Any) -> None:
        with monkeypatch.context() as patched:
            stop_after(patched, 1)
            with pytest.raises(Interrupted):
                train(tiny.recipe(tmp_path))
        if changed == "data":
            tiny.write_chats(tmp_path / "train.jsonl", 24, start=1)
        other: Loaded = tiny.recipe(tmp_path, method={"rank": 8} if changed == "recipe" else {})
        with pytest.raises(RunDirError, match="method.rank: 4 then, 8 now" if changed == "recipe" else "data files"):
            train(other, resume=True)

    def test_record_and_events_hold_what_they_promise(self, tmp_path: Path) -> None:
        record = train(tiny.recipe(tmp_path))
        on_disk = json.loads((tmp_path / "run/run.json").read_text())
        for key in ("recipe", "resolved", "plan", "measured", "vitals", "versions", "device", "status"):
            assert on_disk[key], key
        assert on_disk["status"] == record["status"] == "finished"
        assert on_disk["resolved"]["method"]["alpha"] == 8.0
        assert on_disk["measured"]["peak_bytes"] > 0
        assert on_disk["plan"]["memory"]["total"] > 0
        step = tiny.events(tmp_path / "run", "step")[-1]
        for key in ("loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_bytes"):
            assert step[key] > 0, key
        assert tiny.events(tmp_path / "run", "eval")[-1]["step"] == 4
        card = (tmp_path / "run/adapter/README.md").read_text()
        assert str(tmp_path) not in card
        assert "Held-out loss" in card


def test_loss_falls(tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, training={"max_steps": 30, "gradient_accumulation_steps": 4}))
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) < 0.7 * sum(found[:5])


def test_a_failing_evaluation_does_not_cost_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(_: object, step: int) -> None:
        if step:
            raise MemoryError

    loaded = tiny.recipe(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Loop, "evaluate", out_of_memory)
        with pytest.raises(RunFailed, match="memory ran out after 4 of 4 updates"):
            train(loaded)
    assert (tmp_path / "run/checkpoints/step-4/manifest.json").is_file()
    # Every step was made: resuming only has to write what was trained.
    record = train(loaded, resume=True)
    assert record["status"] == "finished"
    assert record["measured"]["steps"] == 4
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_a_long_warm_up_is_no_failure(tmp_path: Path) -> None:
    # The first updates are less than the last bit of an fp32 weight.
    loaded = tiny.recipe(
        tmp_path,
        "full",
        optimizer={"learning_rate": 1e-6},
        schedule={"warmup_steps": 60},
        training={"max_steps": 70, "gradient_accumulation_steps": 1},
        data={"max_length": 64},
    )
    assert train(loaded)["status"] == "finished"


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        ("opt", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
        ("llama", {}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("qwen2", {}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_finds_architectures_that_cannot_be_packed(
    model_type: str, sizes: dict[str, int], dtype: torch.dtype
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    grouped = {"num_attention_heads": 4, "num_key_value_heads": 2}
    sizes = sizes or {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, **grouped}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=64, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    leak, shift, rounding = packing_error(model.to(dtype), dtype, torch.device("cpu"), 64)
    assert apart(leak, shift, rounding) == (model_type not in ("mamba", "opt"))
    assert model.training


def test_a_model_that_leaks_is_not_trained_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "packing_error", lambda *_: (0.5, 0.5, 0.0))
    with pytest.raises(ModelError, match="does not keep packed documents apart"):
        train(tiny.recipe(tmp_path))
    train(tiny.recipe(tmp_path, data={"packing": False}), overwrite=True)
