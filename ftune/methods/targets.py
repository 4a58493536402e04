"""The linear layers of a base model, and which of them ``target_modules`` names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from ftune.errors import ModelError
from ftune.expressions import compiled, matching
from ftune.methods.types import Linear, Problem
from ftune.models.language import in_language_model, language_prefixes, reads_weight
from ftune.models.quantization import is_4bit

if TYPE_CHECKING:
    from torch import nn


__all__ = ["Targets", "different", "list_linears", "match_targets", "not_quantizable", "target_problems"]


Targets = str | tuple[str, ...]


def list_linears(model: nn.Module) -> tuple[Linear, ...]:
    """Every linear projection of the language model but its output head, in order.

    Works on the meta device too. ``transformers`` keeps GPT-2's weights as ``Conv1D``, transposed.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, prefixes = cast(Any, model).get_output_embeddings(), language_prefixes(model)
    found = []
    for name, module in model.named_modules():
        if module is head or not in_language_model(name, prefixes):
            continue
        parent, _, leaf = name.rpartition(".")
        adaptable = not reads_weight(cast(Any, type(model.get_submodule(parent))), leaf)
        if isinstance(module, torch.nn.Linear):
            plain = type(module) is torch.nn.Linear or is_4bit(module)
            found.append(
                Linear(
                    name,
                    module.in_features,
                    module.out_features,
                    adaptable=adaptable,
                    quantizable=adaptable and plain,
                )
            )
        elif isinstance(module, Conv1D):
            found.append(Linear(name, module.nx, module.nf, True, adaptable, quantizable=False))
    return tuple(found)


def different(linears: Sequence[Linear]) -> int:
    """How many shapes some projections have."""
    return len({(linear.in_features, linear.out_features) for linear in linears})


def match_targets(
    linears: Sequence[Linear], targets: Targets, field: str = "target_modules", *, beside: bool = True
) -> list[Linear]:
    """The projections that a field of the recipe names, with PEFT's rules.

    A list matches whole names or their last components; a string other than ``all-linear`` is a regular
    expression over the whole name.

    Args:
        linears: Of the model.
        targets: As the recipe has them.
        field: Its name, for messages.
        beside: Whether something is put beside them: ``all-linear`` leaves out what that has no effect on.

    Raises:
        ModelError: An entry matches no linear projection inside the blocks, or one past which the model reads the
            weight; or an expression takes too long.
    """
    if targets == "all-linear":
        return [linear for linear in linears if linear.adaptable or not beside]
    matched = _match(linears, targets, field)
    past = [linear.name for linear in matched if not linear.adaptable and beside]
    if past:
        raise ModelError(
            f"{field}: the model reads the weight of `{past[0]}` itself, so an adapter beside it would have no effect",
            help="leave it out; `all-linear` does",
        )
    return matched


def _match(linears: Sequence[Linear], targets: Targets, field: str) -> list[Linear]:
    if isinstance(targets, str):
        try:
            names = set(matching(targets, (linear.name for linear in linears)))
        except ValueError as error:
            raise ModelError(f"{field}: {targets[:80]!r}: {error}", help="give a list of module names") from error
        matched = [linear for linear in linears if linear.name in names]
        if not matched:
            raise ModelError(
                f"{field}: {targets!r} matches no linear layer",
                help=f"an expression has to match a whole name, as `{linears[0].name}`: begin it with `.*`, or give a "
                f"list of names; {_available(linears)}",
            )
        return matched

    def fits(name: str, target: str) -> bool:
        return name == target or name.endswith("." + target)

    for target in targets:
        if not any(fits(linear.name, target) for linear in linears):
            raise ModelError(f"{field}: `{target}` is no linear layer of this model", help=_available(linears))
    return [linear for linear in linears if any(fits(linear.name, target) for target in targets)]


def _available(linears: Sequence[Linear]) -> str:
    leaves = sorted({linear.name.rsplit(".", 1)[-1] for linear in linears})
    return "the model has " + ", ".join(leaves)


def target_problems(targets: Targets, embeddings: str | None = None) -> Iterator[Problem]:
    """Yield what is wrong with ``target_modules`` before any model is known.

    Args:
        targets: As the recipe has them.
        embeddings: Why embeddings and the head are no targets; None: a low-rank update of them cannot be merged.
    """
    loc = ("method", "target_modules")
    if isinstance(targets, str):
        if targets in ("all_linear", "all"):
            yield Problem(loc, f"`{targets}` is no module name", "did you mean `all-linear`?")
            return
        try:
            compiled(targets)
        except ValueError as error:
            yield Problem(loc, f"not a regular expression: {error}", "or give a list of module names")
        return
    if not targets:
        yield Problem(loc, "no target at all: the method would train nothing", "use `all-linear`")
    for index, target in enumerate(targets):
        if target in ("embed_tokens", "wte", "lm_head"):
            yield Problem(
                (*loc, index),
                embeddings
                or f"`{target}` is an embedding or the output head; a low-rank update of tied weights cannot be merged",
                "target the linear layers inside the blocks",
            )


def not_quantizable(model: nn.Module) -> list[str]:
    """Names of the linear layers that stay as they are where a base is quantized; empty where only the head does."""
    import torch

    head, linears = cast(Any, model).get_output_embeddings(), list_linears(model)
    kept = {linear.name for linear in linears if linear.quantizable}
    others = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    left = [name for name in others if name not in kept]
    return [] if all(others[name] is head for name in left) else left
