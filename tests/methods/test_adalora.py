"""AdaLoRA: ranks move to where they matter, add up to the budget, and the run it does so in can be resumed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from run.test_loop import assert_equal, losses, train_until
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from ftune.artifacts import training
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.errors import ModelError, RecipeError, RunFailed
from ftune.methods import METHODS, OptimizerSpec
from ftune.methods.adalora import AdaLora
from ftune.ops.adalora import low_rank_factors
from ftune.plan.resolve import resolve
from ftune.plan.shapes import read_shape
from ftune.recipe import require

SHAPES = Path(__file__).parents[2] / "ftune" / "shapes"
# 14 projections; a mean rank of 1 leaves some of them nothing at all.
SCARCE = {"target_rank": 1, "init_warmup": 0.2, "final_warmup": 0.5, "allocate_every": 2, "dropout": 0.1}
RUN = {"method": SCARCE, "training": {"max_steps": 10}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Tensor]:
    """An uninterrupted run: where it is, its record, and the logits of its model as it is in memory at the end."""
    where, build, models = tmp_path_factory.mktemp("whole"), training.build, []

    def keep(plan: Any) -> Any:
        models.append(build(plan))
        return models[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "build", keep)
        record = train(tiny.recipe(where, "adalora", **RUN))
    return where / "run", record, tiny.logits(models[0][0])


def factors(model: torch.nn.Module) -> dict[str, dict[str, torch.nn.Parameter]]:
    """For each projection its trained ``A``, ``B`` and ``E``."""
    found: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            projection, _, kind = name.removesuffix(".default").rpartition(".lora_")
            found.setdefault(projection, {})[kind] = parameter
    return found


def make_updates(method: AdaLora, model: torch.nn.Module, until: int, watch: Any = None) -> None:
    """Train by hand, in the order of ftune's loop; ``watch(step)`` sees weights and gradients before each pruning."""
    optimizer = method.optimizer(model, OptimizerSpec(learning_rate=1e-2))
    for step in range(1, until + 1):
        ids = tiny.batch(seed=step)["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        (loss + method.penalty(model)).backward()
        optimizer.step()
        expected = watch(step) if watch else None
        method.after_step(model, step)
        optimizer.zero_grad()
        for name, kept in (expected or {}).items():
            assert torch.equal(factors(model)[name]["E"].flatten() != 0, kept), (step, name)


@pytest.mark.parametrize("every", [1, 2])
def test_ranks_are_those_of_the_published_algorithm(every: int) -> None:
    total, first, last, beta1, beta2 = 12, 2, 4, 0.8, 0.9
    method = AdaLora(
        init_rank=6, target_rank=3, init_warmup=2 / 12, final_warmup=4 / 12, allocate_every=every, beta1=0.8, beta2=0.9
    )
    model = method.adapt(tiny.model(), tiny.context(total_steps=total))
    smooth: dict[str, dict[str, Tensor]] = {}
    kept: dict[str, Tensor] = {}
    pruned_at: list[int] = []

    def watch(step: int) -> dict[str, Tensor]:
        if step < total - last:
            for name, parts in factors(model).items():
                for kind, p in parts.items():
                    assert p.grad is not None
                    importance = (p.detach() * p.grad).abs()  # eq. 8
                    mine = smooth.setdefault(f"{name}.{kind}", {"I": torch.zeros_like(p), "U": torch.zeros_like(p)})
                    mine["I"] = beta1 * mine["I"] + (1 - beta1) * importance  # eq. 9
                    mine["U"] = beta2 * mine["U"] + (1 - beta2) * (importance - mine["I"]).abs()  # eq. 10
        if first < step <= total - last and (step % every == 0 or step == total - last):
            # eq. 11: a triplet's score is its singular value's and the means of its vectors'
            names = list(factors(model))
            score = {key: mine["I"] * mine["U"] for key, mine in smooth.items()}
            scores = torch.stack(
                [score[f"{n}.E"].flatten() + score[f"{n}.A"].mean(1) + score[f"{n}.B"].mean(0) for n in names]
            )
            # eq. 12, the cubic schedule
            left = 1 - (step - first) / (total - first - last)
            budget = int(14 * 3 + 14 * (6 - 3) * left**3)
            mask = torch.zeros(scores.numel(), dtype=torch.bool)
            mask[scores.flatten().topk(budget).indices] = True
            kept.update(zip(names, mask.view_as(scores), strict=True))
            pruned_at.append(step)
            return kept
        return kept if step > total - last else {}

    make_updates(method, model, total, watch)
    assert pruned_at == ([3, 4, 5, 6, 7, 8] if every == 1 else [4, 6, 8])
    assert sum(int(mask.sum()) for mask in kept.values()) == 3 * 14
    assert len({int(mask.sum()) for mask in kept.values()}) > 1, "every projection has the same rank"


@pytest.mark.parametrize(("every", "accumulation"), [(1, 1), (4, 3)])
def test_the_ranks_add_up_to_the_budget(accumulation: int, every: int, tmp_path: Path) -> None:
    record = train(
        tiny.recipe(
            tmp_path,
            "adalora",
            method={"allocate_every": every},
            training={"max_steps": 12, "gradient_accumulation_steps": accumulation},
        )
    )
    vitals = record["vitals"]
    assert vitals["ranks_total"] == vitals["budget"] == 4 * 14
    by_module = {key: rank for key, rank in vitals.items() if key.startswith("rank of model.layers.")}
    assert (len(by_module), sum(by_module.values())) == (14, vitals["ranks_total"])
    assert vitals["ranks_min"] < vitals["ranks_mean"] == 4.0 < vitals["ranks_max"] <= 6
    assert vitals["allocations"] == (7 if every == 1 else 2)  # updates 2 to 8
    steps = tiny.events(tmp_path / "run", "step")
    budgets = [step["budget"] for step in steps]
    assert budgets[0] == 6 * 14
    assert budgets == sorted(budgets, reverse=True)
    assert [step["ranks"] for step in steps[7:]] == [4.0 * 14] * 5
    if every == 1:
        assert [step["ranks"] for step in steps] == budgets
    assert record["vitals_line"].startswith("ranks 6 → 4 on average over 14 projections")
    assert "56 of a budget of 56" in record["vitals_line"]


def test_without_the_allocator_the_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaLora, "after_step", lambda self, model, step: {})
    with pytest.raises(RunFailed, match=r"never allocated: 84 of 84"):
        train(tiny.recipe(tmp_path, "adalora"))
    assert not (tmp_path / "run/adapter").exists()


@pytest.mark.parametrize(
    ("total", "works"), [(56, True), (55, True), (57, False), (84, False), (50, False), (0, False)]
)
def test_ranks_that_are_not_the_budget_are_no_success(total: int, works: bool) -> None:
    vitals = {"ranks_total": float(total), "budget": 56.0, "modules": 14.0, "allocations": 3.0}
    assert (tiny.method("adalora").not_at_work(vitals) is None) == works


@pytest.mark.parametrize("step", [1, 3, 4, 6], ids=["initial", "before-pruning", "after-pruning", "final"])
def test_resumed_equals_uninterrupted_in_each_phase(
    step: int, whole: tuple[Path, dict[str, Any], Tensor], tmp_path: Path
) -> None:
    expected, record, _ = whole
    assert record["vitals"]["modules_pruned"] > 0
    parts = tiny.recipe(tmp_path, "adalora", **RUN)
    train_until(parts, step)
    resumed = train(parts, resume=True)
    checkpoints = [run / "checkpoints/step-10" for run in (expected, tmp_path / "run")]
    for file in ("trained.safetensors", "method.safetensors"):
        assert_equal(*[load_file(checkpoint / file) for checkpoint in checkpoints])
    assert losses(expected) == losses(tmp_path / "run")
    assert resumed["vitals"] == record["vitals"]


def test_the_penalty_is_the_mean_distance_from_orthonormal() -> None:
    method = tiny.method("adalora", orthogonal_weight=0.3)
    model = method.adapt(tiny.model(), tiny.context())
    tiny.disturb(model, scale=2)
    penalty = method.penalty(model)
    assert penalty is not None
    penalty.backward()
    value = 0.0
    for parts in factors(model).values():
        for kind in "AB":
            p = parts[kind].detach().double()
            rows = p if kind == "A" else p.T
            off = rows @ rows.T - torch.eye(6)
            distance = math.sqrt(float((off**2).sum()))
            value += 0.3 * distance / 28
            expected = 0.3 / 28 * 2 * off @ rows / distance  # d||PP^T - I||_F / dP
            actual = parts[kind].grad
            assert actual is not None
            torch.testing.assert_close((actual if kind == "A" else actual.T).double(), expected, rtol=1e-4, atol=1e-8)
        assert parts["E"].grad is None
    assert float(penalty.detach()) == pytest.approx(value, rel=1e-6)
    # PEFT adds its own to the loss that it computes itself.
    ids = tiny.batch()["input_ids"]
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids, use_cache=False).loss
        model.peft_config["default"].orth_reg_weight = 0.0
        bare = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert float(theirs - bare) == pytest.approx(value, rel=1e-4)
    assert tiny.method("adalora", orthogonal_weight=0).penalty(model) is None


def test_the_penalty_is_in_the_gradient_once_an_update_and_in_no_loss_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penalty = AdaLora.penalty
    calls = []

    def shifted(self: AdaLora, model: torch.nn.Module) -> Tensor:
        calls.append(1)
        found = penalty(self, model)
        assert found is not None
        return found + 1e3  # no gradient, so nothing but a loss it is part of can change

    shown = []
    for name in ("plain", "shifted", "without"):
        loaded = tiny.recipe(
            tmp_path,
            "adalora",
            method={"orthogonal_weight": 0 if name == "without" else 1},
            evaluation={"every_steps": 2},
            output_dir=str(tmp_path / name),
        )
        with monkeypatch.context() as patched:
            if name == "shifted":
                patched.setattr(AdaLora, "penalty", shifted)
            train(loaded)
        evals = [event["loss"] for event in tiny.events(tmp_path / name, "eval")]
        shown.append((losses(tmp_path / name), evals))
    assert len(calls) == 4
    assert len(shown[0][1]) == 3
    assert shown[0] == shown[1]
    assert shown[0][0][0] == shown[2][0][0]  # before the first update it has changed nothing
    assert shown[0][0][1:] != shown[2][0][1:]


def test_the_adapter_of_a_run_is_its_model_in_plain_peft(whole: tuple[Path, dict[str, Any], Tensor]) -> None:
    run, _, live = whole
    plain = PeftModel.from_pretrained(tiny.model(), str(run / "adapter"))
    torch.testing.assert_close(tiny.logits(plain), live, rtol=1e-5, atol=1e-5)
    saved = load_file(run / "adapter/adapter_model.safetensors")
    assert sum(int(value.count_nonzero()) for name, value in saved.items() if "lora_E" in name) == 14


def test_what_has_grown_back_between_two_prunings_is_saved(tmp_path: Path) -> None:
    method = tiny.method("adalora", **SCARCE | {"allocate_every": 3})
    model = method.adapt(tiny.model(), tiny.context(total_steps=10))
    make_updates(method, model, 4)  # pruned after update 3
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) < sum(int(p["E"].count_nonzero()) for p in factors(model).values())
    live = tiny.logits(model)
    method.save(model, tmp_path, tiny.context())
    assert torch.equal(tiny.logits(method.load(tiny.model(), tmp_path, tiny.context())), live)
    assert model.peft_config["default"].rank_pattern is pattern, "saving changed the run"


def test_as_plain_lora_each_projection_has_the_rank_that_is_left(whole: tuple[Path, dict[str, Any], Tensor]) -> None:
    method = RunDir(whole[0]).recipe().method
    model = method.load(tiny.model(), whole[0] / "adapter", tiny.context())
    plain = tiny.model()
    ranks = []
    with torch.no_grad():
        for name, (a, b) in method.to_lora(model, None).items():
            plain.get_submodule(name).weight += b @ a
            ranks.append(len(a))
    assert sum(ranks) == 14
    assert 0 in ranks
    assert (tiny.logits(plain) - tiny.logits(model)).abs().max() <= 2e-5
    assert max(len(a) for a, _ in method.to_lora(model, 2).values()) == 2


def test_cut_to_a_lower_rank_it_is_the_best_approximation() -> None:
    torch.manual_seed(0)
    a, e, b = torch.randn(6, 20), torch.randn(6, 1), torch.randn(30, 6)
    e[2] = 0
    dense = 0.7 * b @ (e * a)
    exact = low_rank_factors(a, e, b, 0.7)
    assert exact[0].shape == (5, 20)
    torch.testing.assert_close(exact[1] @ exact[0], dense)
    small_a, small_b = low_rank_factors(a, e, b, 0.7, 3)
    u, s, vh = torch.linalg.svd(dense)
    torch.testing.assert_close(small_b @ small_a, u[:, :3] * s[:3] @ vh[:3])


def test_on_a_4_bit_base_it_trains_and_merges_onto_what_it_was_trained_against(tmp_path: Path) -> None:
    record = train(tiny.recipe(tmp_path, "adalora", method={"quantization": {}}))
    assert record["vitals"]["quantized_layers"] == 14
    assert record["vitals"]["ranks_total"] == 56
    report = merge(RunDir(tmp_path / "run"), dtype="float32")
    assert report["merged_vs_adapter"]["max_error"] <= 1e-4
    assert report["base_vs_adapter"]["max_error"] > 0.1


def test_in_bfloat16_it_starts_as_its_base_and_is_loaded_as_it_was(tmp_path: Path) -> None:
    from ftune.run.objective import autocast

    method, context = tiny.method("adalora"), tiny.context(dtype=torch.bfloat16)
    model = method.adapt(tiny.model().bfloat16(), context)
    # PEFT makes the divisor of the scale a trained parameter here.
    assert {kind for parts in factors(model).values() for kind in parts} == {"A", "B", "E"}
    with autocast(torch.bfloat16, "cpu"):
        assert torch.equal(tiny.logits(model), tiny.logits(tiny.model().bfloat16()))
        tiny.disturb(model)
        method.save(model, tmp_path, context)
        again = method.load(tiny.model().bfloat16(), tmp_path, context)
        assert torch.equal(tiny.logits(again), tiny.logits(model))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"init_rank": 8, "target_rank": 8}, "not above target_rank 8"),
        ({"init_warmup": 0.5, "final_warmup": 0.5}, "leave no update to prune in"),
        ({"target_modules": ["lm_head"]}, "cannot be merged"),
        ({"beta1": 1.0}, "beta1"),
    ],
)
def test_what_cannot_work_is_refused_while_parsing(method: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        require(tiny.recipe(tmp_path, "adalora", method=method))


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        ({}, 1, "the run has 1 update; adalora takes 1 before it prunes and 1 after"),
        ({}, 2, "the run has 2 updates"),
        ({"final_warmup": 0.8}, 6, "takes 1 before it prunes and 5 after"),
        ({"allocate_every": 10}, 6, "prunes from update 2 to 4 of 6, and allocate_every 10 has no multiple"),
        ({"init_rank": 33}, 6, "exceeds the size of model.layers.0.self_attn.k_proj"),
        ({"target_modules": ["c_attn"]}, 6, "no linear layer"),
    ],
)
def test_what_cannot_work_is_refused_by_the_plan(
    method: dict[str, Any], steps: int, message: str, tmp_path: Path
) -> None:
    loaded = tiny.recipe(tmp_path, "adalora", method=method, training={"max_steps": steps})
    with pytest.raises(ModelError, match=message) as refused:
        resolve(loaded.recipe)
    assert refused.value.help


def test_three_updates_are_enough(tmp_path: Path) -> None:
    assert train(tiny.recipe(tmp_path, "adalora", training={"max_steps": 3}))["vitals"]["allocations"] == 1


def test_parameters_and_state_on_known_shapes(tmp_path: Path) -> None:
    shape = read_shape(AutoConfig.from_pretrained(SHAPES / "llama-2-7b"))
    assert METHODS["adalora"]().trainable_parameters(shape) == 29_985_408
    method = tiny.method("adalora")
    model = method.adapt(tiny.model(), tiny.context())
    make_updates(method, model, 2)
    allocator = model.base_model.rankallocator
    kept = [allocator.ipt, allocator.exp_avg_ipt, allocator.exp_avg_unc]
    importance = sum(value.numel() * value.element_size() for values in kept for value in values.values())
    adam = 8 * method.trainable_parameters(read_shape(tiny.config()))
    assert method.optimizer_bytes(read_shape(tiny.config()), "adamw") == adam + importance


EVERY_PROCESS = """
import json, sys
import torch
from pathlib import Path
from ftune.artifacts import training
from ftune.recipe import load_recipe

build, models = training.build, []

def keep(plan):
    models.append(build(plan))
    return models[-1]

training.build = keep
record = training.train(load_recipe(Path(sys.argv[1])), progress=False)
model = models[0][0]
trained = {n: p.detach().double().sum().item() for n, p in model.named_parameters() if p.requires_grad}
mine = [trained, model.peft_config["default"].rank_pattern, record["vitals"]]
found = [None] * torch.distributed.get_world_size()
torch.distributed.all_gather_object(found, mine)
if torch.distributed.get_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_prune_the_same_triplets(tmp_path: Path) -> None:
    loaded = tiny.recipe(
        tmp_path,
        "adalora",
        data={"packing": False},
        training={"max_steps": 8, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
    )
    (tmp_path / "recipe.yaml").write_text(loaded.text)
    (tmp_path / "every_process.py").write_text(EVERY_PROCESS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, *(str(tmp_path / name) for name in ("every_process.py", "recipe.yaml", "found.json"))],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "found.json").read_text())
    assert first == second
    assert first[2]["ranks_total"] == 4 * 14
