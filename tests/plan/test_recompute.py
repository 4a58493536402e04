"""Selective recomputation: how many blocks, which ones, and that nothing changes but memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from ftune.data.batches import padded_length
from ftune.errors import ModelError
from ftune.memory.advice import MARGIN
from ftune.methods import METHODS
from ftune.plan.recompute import choose_blocks, enable_checkpointing, is_random, written
from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of

LAYERS = 3
RECOMPUTABLE = [name for name, method in METHODS.items() if method.recomputable]


def chosen(asked: Any, budget: int, recomputable: bool = True) -> tuple[int, int]:
    """Blocks chosen where each saves one byte of 110, and how often the prediction was asked for."""
    asks: list[int] = []

    def needed(blocks: int) -> int:
        asks.append(blocks)
        return 110 - blocks

    return choose_blocks(asked, 80, needed=needed, budget=budget, recomputable=recomputable).blocks, len(asks)


@pytest.mark.parametrize(
    ("budget", "blocks"), [(1000, 0), (110, 0), (109, 1), (75, 35), (31, 79), (30, 80), (29, 80), (1, 80)]
)
def test_auto_takes_the_fewest_blocks_that_fit(budget: int, blocks: int) -> None:
    found, asks = chosen("auto", budget)
    assert found == blocks
    assert asks <= 10


@pytest.mark.parametrize(("asked", "blocks"), [(True, 80), (False, 0), (1, 1), (80, 80)])
def test_what_the_recipe_says_is_done(asked: bool | int, blocks: int) -> None:
    assert chosen(asked, 1) == (blocks, 0)


def test_a_method_that_cannot_is_left_alone() -> None:
    assert chosen("auto", 1, recomputable=False) == (0, 0)


def test_more_blocks_than_there_are_are_refused() -> None:
    with pytest.raises(ModelError, match="81, and the model has 80 blocks"):
        chosen(81, 1)


@pytest.mark.parametrize(("asked", "text"), [(80, True), (True, True), (False, False), (7, 7)])
def test_the_choice_is_written_so_that_it_is_made_again(asked: bool | int, text: bool | int) -> None:
    made = written(choose_blocks(asked, 80, needed=lambda _: 0, budget=1, recomputable=True))
    assert made is text


# --- in the model -----------------------------------------------------------------------------------------


def adapted(name: str, *, dropout: float = 0.0) -> Any:
    method = tiny.method(name, **({"dropout": dropout} if dropout else {}))
    model = method.adapt(tiny.model(num_hidden_layers=LAYERS), tiny.context())
    tiny.disturb(model)
    return model.train()


def gradients(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name, and the bytes that autograd kept for them."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**tiny.batch(length=40), use_cache=False).logits.square().mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("name", RECOMPUTABLE)
def test_recomputed_blocks_change_no_gradient_and_each_keeps_less(name: str) -> None:
    plain, kept = gradients(adapted(name))
    before = kept
    for blocks in (1, 2, LAYERS):
        model = adapted(name)
        enable_checkpointing(model, blocks)
        found, kept = gradients(model)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[key], plain[key]) for key in plain)
        assert kept < before
        before = kept


def test_dropout_is_drawn_again_as_it_was() -> None:
    plain, _ = gradients(adapted("lora", dropout=0.5))
    model = adapted("lora", dropout=0.5)
    enable_checkpointing(model, 2)
    found, _ = gradients(model)
    assert all(torch.equal(found[key], plain[key]) for key in plain)


def test_blocks_below_the_first_that_trains_are_passed_over() -> None:
    def flags(trained: str, blocks: int) -> list[bool]:
        model = tiny.model(num_hidden_layers=LAYERS)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        enable_checkpointing(model, blocks)
        return [layer.gradient_checkpointing for layer in model.model.layers]  # type: ignore[union-attr]

    assert flags("layers.1", 1) == [False, True, False]
    assert flags("layers", 1) == [True, False, False]
    assert flags("embed_tokens", 2) == [True, True, False]


# --- in the plan ------------------------------------------------------------------------------------------


def planned(where: Path, **training: Any) -> Any:
    return resolve(tiny.recipe(where, training=training).recipe)


def test_the_plan_holds_the_run_to_the_recipe_s_memory(tmp_path: Path) -> None:
    free = planned(tmp_path)
    assert (free.recomputed.blocks, free.recipe.training.gradient_checkpointing) == (0, False)
    all_kept, all_recomputed = (
        planned(tmp_path, gradient_checkpointing=on).memory.total / 2**30 for on in (False, True)
    )
    between = (all_kept + all_recomputed) / 2 / (1 - MARGIN)
    tight = planned(tmp_path, memory_gib=between)
    summary = summary_of(tight)
    assert summary["training"]["recomputed_blocks"] == 1
    assert tight.context.recomputed_blocks == tight.recipe.training.gradient_checkpointing == 1
    assert summary["fits"]
    assert summary["budget"] == int(between * 2**30) < summary["device"]["available"]
    hopeless = summary_of(planned(tmp_path, memory_gib=0.1))
    assert not hopeless["fits"]
    assert hopeless["training"]["recomputed_blocks"] == 2


def test_regrouped_rows_are_planned_as_one(tmp_path: Path) -> None:
    rows = {"micro_batch_size": 4, "gradient_accumulation_steps": 2}
    as_asked, regrouped, at_most_all = (
        planned(tmp_path, **rows, micro_batch_tokens=tokens) for tokens in (None, 500, 10**6)
    )
    longest = max(as_asked.row_lengths)
    assert [plan.memory.request.rows for plan in (as_asked, regrouped, at_most_all)] == [1, 1, 1]
    assert regrouped.memory.request.length == 512  # what 500 tokens are padded to
    some, all_at_once = (plan.memory.request.length for plan in (as_asked, at_most_all))
    assert longest < some <= 4 * longest < all_at_once <= 8 * longest


def test_of_a_long_run_the_largest_micro_batch_is_the_largest_there_may_be(tmp_path: Path) -> None:
    rows = {"micro_batch_size": 3, "max_steps": 100}
    as_asked, regrouped = (planned(tmp_path, **rows, micro_batch_tokens=tokens) for tokens in (None, 500))
    for plan, expected in ((as_asked, padded_length(3 * max(as_asked.row_lengths))), (regrouped, 512)):
        assert (plan.memory.request.rows, plan.memory.request.length) == (1, expected)
        assert plan.memory.request.target_tokens == expected


def test_a_resumed_run_recomputes_what_it_began_with(tmp_path: Path) -> None:
    from ftune.artifacts.run_dir import RunDir
    from ftune.artifacts.training import train

    train(tiny.recipe(tmp_path, training={"gradient_checkpointing": 1}))
    auto = tiny.recipe(tmp_path, training={"memory_gib": 1000.0}).recipe
    assert auto.training.gradient_checkpointing == "auto"
    assert RunDir(tmp_path / "run").as_begun(auto).training.gradient_checkpointing == 1


@pytest.mark.parametrize(
    ("config", "random"),
    [
        (tiny.config(), False),
        (tiny.config(attention_dropout=0.1), True),
        # used by heads alone, which no causal model has
        (GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), False),
        (GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=32), True),
    ],
)
def test_what_is_random(config: Any, random: bool) -> None:
    assert is_random(AutoModelForCausalLM.from_config(config)) is random


def test_chance_in_a_configuration_of_a_part_counts() -> None:
    model = tiny.model()
    model.config = SimpleNamespace(to_dict=lambda: {"text_config": {"attention_dropout": 0.1}, "vocab_size": 32})
    assert is_random(model)
