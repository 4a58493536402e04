"""What to change in a recipe whose run does not fit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftune.data.batches import padded_length
from ftune.human import bytes_text
from ftune.methods import METHODS, Method
from ftune.methods.quantization import Quantization
from ftune.plan.memory import MemoryEstimate, estimate, stored_bytes

__all__ = ["MARGIN", "Change", "certain", "savings", "what_to_change"]

MARGIN = 0.05
"""Share of the memory that stays free where a plan says that a run fits: a predicted peak is right to about that."""


def certain(available: int) -> int:
    """Bytes up to which a predicted peak fits for certain."""
    return int(available * (1 - MARGIN))


@dataclass(frozen=True)
class Change:
    """A change to a recipe that saves memory.

    Attributes:
        text: What to write, as in a recipe, with a word on what it costs.
        settings: The same as ``--set`` takes it.
        arguments: The arguments of ``estimate`` that it changes.
    """

    text: str
    settings: tuple[str, ...]
    arguments: dict[str, Any]


def savings(estimate_: MemoryEstimate, recipe: Any, available: int = 0) -> list[tuple[Change, int]]:
    """Changes to the recipe that save at least 2 % of the total, and the bytes each saves; the least harmful first.

    First what changes no result, then what rounds otherwise, then another method's base, then shorter rows.

    Args:
        estimate_: An estimate from ``estimate``.
        recipe: The recipe, from which the current values are read.
        available: Bytes with which a change that has degrees goes no further.
    """
    arguments = dict(estimate_.arguments)
    saved = [
        (change, estimate_.total - _again(arguments, change.arguments).total)
        for change in _changes(arguments, recipe, available)
    ]
    return [(change, saving) for change, saving in saved if saving * 50 >= estimate_.total]


def what_to_change(estimate_: MemoryEstimate, available: int, recipe: Any) -> list[str]:
    """Say what to change in the recipe when the run does not fit for certain, with the bytes each change saves.

    Args:
        estimate_: An estimate from ``estimate``.
        available: Bytes of memory that the run may use.
        recipe: The recipe, from which the current values are read.

    Returns:
        One line for each change that saves at least 2 % of the total, the least harmful first; then the least harmful
        changes that fit together, as options to copy, or that none do. Nothing when the run fits.
    """
    if estimate_.total <= certain(available):
        return []
    useful = savings(estimate_, recipe, certain(available))
    lines = []
    for change, saving in useful:
        left = estimate_.total - saving
        lines.append(f"{change.text}: saves {bytes_text(saving)}, {_verdict(left, available)}")
    # One that saves little by itself may be what is missing: the dtype of what `qlora` leaves in 32 bits.
    arguments = dict(estimate_.arguments)
    together, needed = _together(_changes(arguments, recipe, certain(available)), arguments, available)
    if needed <= available:
        options = " ".join(f"--set {shlex.quote(setting)}" for change in together for setting in change.settings)
        lines.append(f"{options}: needs {bytes_text(needed)}, {_verdict(needed, available)}")
    else:
        least = f" (all of it together still needs {bytes_text(needed)})" if useful else ""
        lines.append(f"no change to the recipe is enough{least}: take a smaller model or a larger device")
    return lines


def _verdict(needed: int, available: int) -> str:
    if needed > available:
        return f"then needs {bytes_text(needed)}"
    return "fits" if needed <= certain(available) else "may just fit"


def _together(changes: Sequence[Change], arguments: dict[str, Any], available: int) -> tuple[tuple[Change, ...], int]:
    """The least harmful changes with which a run fits, and the bytes it needs then; else those that save most.

    Sets are tried in the order of binary numbers whose highest digit is the most harmful change, so that it is left
    out where it can be, and so on down.
    """
    least: tuple[tuple[Change, ...], int] | None = None
    for number in range(1, 2 ** len(changes)):
        chosen = tuple(change for digit, change in enumerate(changes) if number >> digit & 1)
        keys = [key for change in chosen for key in change.arguments]
        if len(set(keys)) < len(keys):
            continue  # two values for one thing
        merged = {key: value for change in chosen for key, value in change.arguments.items()}
        needed = _again(arguments, merged).total
        if needed <= certain(available):
            return chosen, needed
        if least is None or needed < least[1]:
            least = chosen, needed
    return least or ((), _again(arguments, {}).total)


def _changes(arguments: dict[str, Any], recipe: Any, available: int) -> list[Change]:
    """Changes to a recipe that save memory, the least harmful first."""
    changes: list[Change] = []

    def add(text: str, change: dict[str, Any], *settings: str) -> None:
        changes.append(Change(text, settings or (text.replace(": ", "=", 1),), change))

    method: Method = arguments["method"]
    blocks = arguments["shape"].layers
    if arguments["recomputed_blocks"] < blocks and method.recomputable:
        add("training.gradient_checkpointing: true", {"recomputed_blocks": blocks})
    if arguments["rows"] > 1 and not method.updates_in_backward:
        rows = arguments["rows"]
        steps = recipe.training.accumulation * rows
        add(
            f"training.micro_batch_size: 1 with gradient_accumulation_steps: {steps}",
            {"rows": 1, "target_tokens": arguments["target_tokens"] // rows},
            "training.micro_batch_size=1",
            f"training.gradient_accumulation_steps={steps}",
        )
    length, longest = arguments["length"], arguments["longest"]
    if longest is not None and longest < length:
        at_once, fewer = _fewer_at_once(arguments, available)
        setting = f"training.micro_batch_tokens={fewer}"
        add(f"training.micro_batch_tokens: {fewer}, which changes no result", at_once, setting)
    if arguments["optimizer"] in ("adamw", "paged_adamw"):
        add("optimizer.name: adamw_8bit", {"optimizer": "adamw_8bit"})
    if arguments["dtype_bytes"] == 4:
        slower = ", slower on a CPU without bfloat16" if arguments["device_type"] == "cpu" else ""
        add(f"model.dtype: bfloat16{slower}", {"dtype_bytes": 2}, "model.dtype=bfloat16")
    for text, lighter in method.lighter():
        before, after = (each.model_dump(mode="json") for each in (method, lighter))
        settings = [f"method.{name}={_yaml(after[name])}" for name in after if after[name] != before[name]]
        if lighter.updates_in_backward and not method.updates_in_backward:
            settings += ["training.gradient_accumulation_steps=1", "training.max_grad_norm=null"]
        change: dict[str, Any] = {"method": lighter}
        if arguments["dtype_bytes"] == 4 and stored_bytes(lighter, 4) < 4:  # 16-bit weights compute in nothing larger
            change, text = change | {"dtype_bytes": 2}, f"{text}, with model.dtype: bfloat16"
            settings.append("model.dtype=bfloat16")
        add(text, change, *settings)
    if method.quantizable and method.base_quantization is None:
        smaller = method.model_copy(update={"quantization": Quantization()})
        add("method.quantization: {type: nf4}", {"method": smaller})
    elif method.base_quantization is None:
        # The method whose base is 4-bit unless it is told otherwise.
        small = [n for n, cls in METHODS.items() if getattr(cls.model_fields.get("quantization"), "default", None)]
        for name in small[:1]:
            add(f"method: {name}", {"method": METHODS[name]()})
    shorter = recipe.data.max_length // 2
    if (longest is None or longest >= length) and shorter >= 128 and (padded := padded_length(shorter)) < length:
        share = {"length": padded, "longest": longest and padded, "_target_share": padded / length}
        add(f"data.max_length: {shorter}", share)
    return [change for change in changes if _runs(arguments | change.arguments, recipe)]


def _yaml(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


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
