from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftune.plan.table import render_plan

GOLDEN = Path(__file__).parent / "golden"

PLAN: dict[str, Any] = {
    "model": {
        "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "type": "llama",
        "parameters": 134_515_008,
        "dtype": "bfloat16",
        "vocab": 49_152,
    },
    "method": {
        "name": "qlora",
        "trainable": 4_884_480,
        "share": 4_884_480 / (134_515_008 + 4_884_480),
        "settings": {
            "rank": 16,
            "alpha": 32.0,
            "dropout": 0.0,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "rslora": False,
            "quantization": {"type": "nf4", "double": True, "compute_dtype": "auto"},
        },
    },
    "data": {
        "format": "messages",
        "rows": 1_203,
        "tokens": 412_345,
        "target_tokens": 201_987,
        "truncated": 3,
        "skipped": 0,
        "no_target": 1,
        "rows_packed": 436,
        "fill": 0.9236,
        "eval_rows": 100,
        "eval_tokens": 34_210,
        "packing": True,
        "max_length": 1_024,
        "ends_with_eos": 0.9975,
    },
    "training": {
        "steps": 55,
        "epochs": 1.0,
        "global_batch": 8,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "world_size": 1,
        "learning_rate": 2e-4,
        "optimizer": "adamw",
        "schedule": "cosine",
        "warmup_steps": 2,
        "blocks": 30,
        "recomputed_blocks": 0,
        "recomputed_because": "the run fits without",
    },
    "memory": {
        "weights": 111_149_056,
        "adapters": 19_537_920,
        "gradients": 19_537_920,
        "optimizer": 39_075_840,
        "activations": 726_663_168,
        "logits": 301_989_888,
        "buffers": 299_892_736,
        "runtime": 587_202_560,
        "total": 2_105_049_088,
    },
    "device": {"type": "cpu", "name": "8 cores", "available": 16 * 2**30},
    "budget": 16 * 2**30,
    "fits": True,
    "advice": [],
    "warnings": [],
}

TIGHT = PLAN | {
    "training": PLAN["training"] | {"recomputed_blocks": 12, "recomputed_because": "as asked for"},
    "budget": 2**30,
    "fits": False,
    "advice": [
        "training.gradient_checkpointing: true: saves 0.7 GiB, then needs 1.3 GiB",
        "data.max_length: 512: saves 0.6 GiB, then needs 1.4 GiB",
        "all of these together: needs 1.0 GiB, fits",
    ],
    "warnings": ["3 rows were cut at 1,024 tokens (the longest has 1,988): raise data.max_length to keep them whole"],
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("name", "plan"), [("fits", PLAN), ("tight", TIGHT)])
def test_rendering(golden: Callable[[Path, str], None], name: str, plan: dict[str, Any], width: int) -> None:
    golden(GOLDEN / f"plan_{name}_{width}.txt", render_plan(plan, width))


@pytest.mark.parametrize("width", [72, 80, 97, 120, 200])
def test_lines_keep_to_the_width(width: int) -> None:
    lines = render_plan(TIGHT, width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("key", PLAN)
@pytest.mark.parametrize("absent", [True, False], ids=["absent", "none"])
def test_a_missing_block_is_left_out(key: str, absent: bool) -> None:
    plan = {name: block for name, block in PLAN.items() if name != key} | ({} if absent else {key: None})
    text = render_plan(plan, 80)
    assert "None" not in text
    whole = render_plan(PLAN, 80).splitlines()
    assert len(text.splitlines()) <= len(whole)


@pytest.mark.parametrize("block", ["model", "method", "data", "training", "device"])
def test_a_missing_value_is_left_out(block: str) -> None:
    for key in PLAN[block]:
        assert "None" not in render_plan(PLAN | {block: PLAN[block] | {key: None}}, 120), key


def test_an_empty_plan_renders() -> None:
    assert render_plan({}, 80).strip() == ""


def test_the_verdict_says_how_much() -> None:
    assert "fits: 14 GiB to spare" in render_plan(PLAN, 80)
    assert "does not fit: 984 MiB too much" in render_plan(TIGHT, 80)


def test_several_processes_are_named() -> None:
    training = PLAN["training"] | {"world_size": 2, "global_batch": 16, "micro_batch_size": 2}
    assert "(2 in a micro-batch x 8 accumulated x 2 processes)" in render_plan(PLAN | {"training": training}, 120)
