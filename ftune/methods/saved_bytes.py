"""Bytes that low-rank layers keep for the backward pass: shapes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ftune.methods.targets import Targets, match_targets
from ftune.methods.types import Linear, ModelShape

if TYPE_CHECKING:
    pass

__all__ = ["keeps_output", "lean_saved_bytes", "lean_saved_copies", "low_rank_saved_bytes", "makes_input_again"]


# Projections that read the same tensor, so that autograd keeps it once for all of them.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def makes_input_again(shape: ModelShape, linear: Linear) -> bool:
    """Whether a layer's input is made again in the backward pass, of what a norm or a gate keeps anyway."""
    leaf = linear.name.rpartition(".")[2]
    if leaf in ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj"):
        return bool(shape.extra["pre_norm"])
    return leaf == "down_proj" and bool(shape.extra["lean_gate"])


def keeps_output(shape: ModelShape, linear: Linear) -> bool:
    """Whether what reads a layer's output keeps it as it is: attention its values, a gate its factors."""
    leaf = linear.name.rpartition(".")[2]
    return leaf == "v_proj" or (leaf in ("gate_proj", "up_proj") and bool(shape.extra["lean_gate"]))


def lean_saved_bytes(shape: ModelShape, targets: Sequence[Linear], rank: int, dtype_bytes: int) -> int:
    """Bytes a token that lean low-rank layers keep: ``xA``, and the inputs that no norm or gate makes again."""
    kept = [linear for linear in targets if not makes_input_again(shape, linear)]
    names = tuple(linear.name for linear in kept)
    inputs = low_rank_saved_bytes(kept, names, 0, dtype_bytes) if kept else 0
    return inputs + rank * len(targets) * dtype_bytes


def lean_saved_copies(targets: Sequence[Linear], rank: int, dtype_bytes: int) -> int:
    """Bytes of the copies of A, and in 16 bits of B, that ``ftune.ops.linear`` keeps for the backward pass.

    Layers of transposed weights are PEFT's own, which keeps none.
    """
    lean = [linear for linear in targets if not linear.transposed]
    return dtype_bytes * rank * sum(t.in_features + (t.out_features if dtype_bytes < 4 else 0) for t in lean)


def low_rank_saved_bytes(linears: Sequence[Linear], targets: Targets, rank: int, dtype_bytes: int) -> int:
    """Bytes a token that the low-rank products keep for the backward pass: each distinct input, and ``xA``."""
    elements = 0
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for linear in match_targets(linears, targets):
        parent, _, leaf = linear.name.rpartition(".")
        group = next((names for names in _SAME_INPUT if leaf in names), (leaf,))
        elements += rank
        # The input of the output projection is attention's result, which attention keeps anyway.
        if leaf not in ("o_proj", "out_proj") and (parent, group) not in seen:
            seen.add((parent, group))
            elements += linear.in_features
    return elements * dtype_bytes
