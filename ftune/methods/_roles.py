"""Which projection of a block does what: queries, keys, values, and the feed-forward's way back.

Architectures name the same projection differently, and some fuse several into one. Names are looked up for the
attention and shapes for the feed-forward, so that a method's default targets exist on every decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ftune.errors import ModelError
from ftune.methods.targets import Targets, match_targets
from ftune.methods.types import Linear

__all__ = ["AUTO", "attention", "feed_forward", "or_attention", "shortest"]

AUTO = "auto"
"""What ``target_modules`` says when the method is to find its own targets."""

Role = Literal["query", "key", "value"]

_NAMES: dict[Role, tuple[str, ...]] = {
    "query": ("q_proj", "query", "wq"),
    "key": ("k_proj", "key", "wk"),
    "value": ("v_proj", "value", "wv"),
}
_FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "qkv")


def attention(linears: Sequence[Linear], *roles: Role) -> tuple[str, ...]:
    """The names of the projections that make queries, keys or values; of a fused one, where they are fused.

    Raises:
        ModelError: None has a known name.
    """
    leaves = {_leaf(linear) for linear in linears}
    found = [next((name for name in _NAMES[role] if name in leaves), None) for role in roles]
    separate = tuple(name for name in found if name is not None)
    if len(separate) == len(roles):
        return separate
    fused = tuple(name for name in _FUSED if name in leaves)
    if not fused:
        raise ModelError(
            f"no projection of this model is known to make the {' and '.join(roles)}",
            help=f"name it in `target_modules`: the model has {', '.join(sorted(leaves))}",
        )
    return fused


def or_attention(linears: Sequence[Linear], targets: Targets, *roles: Role) -> Targets:
    """The targets as written, or the attention's projections where the recipe leaves the choice."""
    return attention(linears, *roles) if targets == AUTO else targets


def feed_forward(linears: Sequence[Linear]) -> tuple[str, ...]:
    """The names of the projections from a feed-forward's inner width back to the residual stream.

    They are found by shape: the last projection of a module other than the attention that is as wide as the
    attention's input.

    Raises:
        ModelError: There is none.
    """
    reads = match_targets(linears, attention(linears, "query"))
    hidden, inside_attention = reads[0].in_features, {_parent(linear) for linear in reads}
    last = {_parent(linear): linear for linear in linears if _parent(linear) not in inside_attention}
    back = [linear for linear in last.values() if linear.out_features == hidden and linear.adaptable]
    if not back:
        raise ModelError(
            "no feed-forward was found in this model", help="name its last projection in `feedforward_modules`"
        )
    return shortest(back, linears)


def shortest(chosen: Sequence[Linear], linears: Sequence[Linear]) -> tuple[str, ...]:
    """The shortest list of suffixes that matches the chosen projections and no other; else their whole names."""
    wanted = {linear.name for linear in chosen}
    for components in (1, 2):
        names = tuple(dict.fromkeys(".".join(linear.name.split(".")[-components:]) for linear in chosen))
        if {linear.name for linear in match_targets(linears, names)} == wanted:
            return names
    return tuple(linear.name for linear in chosen)


def _leaf(linear: Linear) -> str:
    return linear.name.rpartition(".")[2]


def _parent(linear: Linear) -> str:
    return linear.name.rpartition(".")[0]
