"""What to change in a recipe whose run does not fit."""

from __future__ import annotations

from typing import Any

from ftune.data.batches import padded_length
from ftune.human import bytes_text
from ftune.methods import METHODS, Method
from ftune.methods.quantization import Quantization
from ftune.plan.memory import MemoryEstimate, estimate

__all__ = ["savings", "what_to_change"]


def savings(estimate_: MemoryEstimate, recipe: Any, available: int = 0) -> list[tuple[str, dict[str, Any], int]]:
    """Changes to the recipe that save at least 2 % of the total, the largest first.

    Args:
        estimate_: An estimate from ``estimate``.
        recipe: The recipe, from which the current values are read.
        available: Bytes with which a change that has degrees goes no further.

    Returns:
        What to write, the arguments of ``estimate`` that it changes, and the bytes it saves.
    """
    arguments = dict(estimate_.arguments)
    changes = _changes(arguments, recipe, available)
    saved = [(text, change, estimate_.total - _again(arguments, change).total) for text, change in changes]
    return sorted((item for item in saved if item[2] * 50 >= estimate_.total), key=lambda item: -item[2])


def what_to_change(estimate_: MemoryEstimate, available: int, recipe: Any) -> list[str]:
    """Say what to change in the recipe when the run does not fit, with the bytes each change saves.

    Args:
        estimate_: An estimate from ``estimate``.
        available: Bytes of memory that the run may use.
        recipe: The recipe, from which the current values are read.

    Returns:
        One line for each change that saves at least 2 % of the total, the largest first, and one about all
        of them together when none suffices alone; nothing when the run fits.
    """
    if estimate_.total <= available:
        return []
    arguments = dict(estimate_.arguments)
    useful = savings(estimate_, recipe, available)
    lines = []
    for text, _, saving in useful:
        left = estimate_.total - saving
        verdict = "fits" if left <= available else f"then needs {bytes_text(left)}"
        lines.append(f"{text}: saves {bytes_text(saving)}, {verdict}")
    if all(estimate_.total - saving > available for *_, saving in useful):
        together: dict[str, Any] = {}
        for _, change, _ in useful:
            together |= change
        needed = _again(arguments, together).total
        if needed <= available:
            lines.append(f"all of these together: needs {bytes_text(needed)}, fits")
        else:
            least = f" (all of it together still needs {bytes_text(needed)})" if useful else ""
            lines.append(f"no change to the recipe is enough{least}: take a smaller model or a larger device")
    return lines


def _changes(arguments: dict[str, Any], recipe: Any, available: int) -> list[tuple[str, dict[str, Any]]]:
    """Changes to a recipe that save memory: what to write, and the arguments of ``estimate`` it changes."""
    changes: list[tuple[str, dict[str, Any]]] = []
    method: Method = arguments["method"]
    blocks = arguments["shape"].layers
    if arguments["recomputed_blocks"] < blocks and method.recomputable:
        changes.append(("training.gradient_checkpointing: true", {"recomputed_blocks": blocks}))
    if arguments["rows"] > 1 and not method.updates_in_backward:
        rows = arguments["rows"]
        steps = recipe.training.accumulation * rows
        changes.append(
            (
                f"training.micro_batch_size: 1 with gradient_accumulation_steps: {steps}",
                {"rows": 1, "target_tokens": arguments["target_tokens"] // rows},
            )
        )
    length, longest = arguments["length"], arguments["longest"]
    shorter = recipe.data.max_length // 2
    if longest is not None and longest < length:
        change, fewer = _fewer_at_once(arguments, available)
        changes.append((f"training.micro_batch_tokens: {fewer}, which changes no result", change))
    elif shorter >= 128 and (padded := padded_length(shorter)) < length:
        change = {"length": padded, "longest": longest and padded, "_target_share": padded / length}
        changes.append((f"data.max_length: {shorter}", change))
    if arguments["optimizer"] in ("adamw", "paged_adamw"):
        changes.append(("optimizer.name: adamw_8bit", {"optimizer": "adamw_8bit"}))
    changes += [(text, {"method": lighter}) for text, lighter in method.lighter()]
    if method.quantizable and method.base_quantization is None:
        smaller = method.model_copy(update={"quantization": Quantization()})
        changes.append(("method.quantization: {type: nf4}", {"method": smaller}))
    elif method.artifact == "model":
        # The method whose base is 4-bit unless it is told otherwise.
        small = [n for n, cls in METHODS.items() if getattr(cls.model_fields.get("quantization"), "default", None)]
        changes += [(f"method: {name}", {"method": METHODS[name]()}) for name in small[:1]]
    return [(text, change) for text, change in changes if _runs(arguments | change, recipe)]


def _fewer_at_once(arguments: dict[str, Any], available: int) -> tuple[dict[str, Any], int]:
    """Half as many tokens in a forward pass, and half again, until they fit or the longest row fills one."""
    length = fewer = arguments["length"]
    while True:
        fewer = max(arguments["longest"], padded_length(fewer // 2))
        change = {"length": fewer, "_target_share": fewer / length}
        if fewer == arguments["longest"] or _again(arguments, change).total <= available:
            return change, fewer


def _runs(arguments: dict[str, Any], recipe: Any) -> bool:
    """Whether the engine can run a recipe once it is changed."""
    if arguments["engine"] == "ddp":
        return True
    method: Method = arguments["method"]
    optimizer = recipe.optimizer.model_copy(update={"name": arguments["optimizer"]})
    changed = recipe.model_copy(update={"method": method, "optimizer": optimizer})
    return not any(method.engine_problems(changed, arguments["engine"]))


def _again(arguments: dict[str, Any], change: dict[str, Any]) -> MemoryEstimate:
    """Estimate once more with some arguments changed."""
    changed = arguments | change
    share = changed.pop("_target_share", 1.0)
    changed["target_tokens"] = max(1, int(changed["target_tokens"] * share))
    return estimate(**changed)
