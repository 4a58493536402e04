"""The shapes of micro-batches that a plan foresees, and the kernels that are kept for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

from ftune.data import batches
from ftune.methods import METHODS
from ftune.plan.kernels import KERNEL_BYTES, UPDATES, Shapes, kernel_bytes, shapes_of
from ftune.plan.resolve import resolve
from ftune.plan.shapes import read_shape
from ftune.run import loop

SETTINGS: dict[str, Any] = {
    "global_batch": 4,
    "micro_batch_size": 2,
    "micro_batch_tokens": 100,
    "by_length": False,
    "seed": 0,
    "world": 1,
}


@pytest.mark.parametrize(
    ("method", "training", "packing"),
    [
        ("lora", {"micro_batch_size": 1, "gradient_accumulation_steps": 3}, False),
        ("lora", {"micro_batch_size": 3, "micro_batch_tokens": 90, "epochs": 3}, False),
        ("lora", {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}, True),
        # Rows that cannot be laid behind each other, in an order by length.
        ("prompt", {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2}, False),
    ],
)
def test_every_shape_of_a_run_is_foreseen(
    method: str, training: dict[str, Any], packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ftune.artifacts.training import train

    loaded = tiny.recipe(tmp_path, method, training=training, data={"packing": packing, "eval": None})
    seen, targets = set(), []

    def watching(*arguments: Any, **named: Any) -> batches.Batch:
        batch = batches.collate(*arguments, **named)
        seen.add(tuple(batch.input_ids.shape))
        targets.append(batch.target_tokens)
        return batch

    monkeypatch.setattr(loop, "collate", watching)
    train(loaded)
    foreseen = resolve(loaded.recipe).memory.arguments
    assert foreseen["row_shapes"] == len(seen) > (0 if packing else 1)
    assert foreseen["target_tokens"] == max(targets)
    if METHODS[method].packable:
        assert (foreseen["rows"], foreseen["length"]) == (1, max(rows * length for rows, length in seen))


def test_a_long_run_is_judged_by_some_of_its_rows() -> None:
    lengths = [20 + 7 * (i % 11) for i in range(5000)]
    few = shapes_of(lengths, lengths, steps=5000, flat=True, **SETTINGS)
    assert (few.most_tokens, few.most_targets) == (None, None)
    # widths of 8 to 104 tokens in steps of 8
    assert 8 <= few.different <= 12
    steps = UPDATES * 2
    assert shapes_of(lengths[: steps * 4], lengths, steps=steps, flat=False, **SETTINGS).most_tokens is None


def test_of_several_processes_the_largest_micro_batch_is_not_known() -> None:
    shapes = shapes_of([10] * 8, [5] * 8, steps=2, flat=True, **SETTINGS | {"world": 2})
    assert shapes == Shapes(1, None, None)
    assert shapes_of([10] * 8, [5] * 8, steps=2, flat=True, **SETTINGS) == Shapes(1, 40, 20)


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_adds_products(name: str) -> None:
    shape = read_shape(tiny.config())
    method = tiny.method(name)
    one, three = (kernel_bytes(method, shape, shapes) for shapes in (1, 3))
    assert three == 3 * one
    assert one >= 2 * len({(linear.in_features, linear.out_features) for linear in shape.linears}) * KERNEL_BYTES
    assert kernel_bytes(method, shape, 10**6) == kernel_bytes(method, shape, 10**5)  # the cache is full
