"""What to change in a recipe whose run does not fit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import reduce
from typing import Any

from ftune.data.batches import padded_length
from ftune.human import bytes_text
from ftune.memory.estimate import MemoryEstimate, estimate
from ftune.memory.request import Request, stored_bytes
from ftune.methods import METHODS
from ftune.methods.quantization import Quantization

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
        fields: The fields of the request that it changes.
        targets_left: The share of the tokens in the loss that a micro-batch still has.
    """

    text: str
    settings: tuple[str, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    targets_left: Fraction = Fraction(1)

    def of(self, request: Request) -> Request:
        """The request of the recipe so changed."""
        targets = max(1, int(request.target_tokens * self.targets_left))
        return replace(request, **self.fields, target_tokens=targets)


def savings(estimate_: MemoryEstimate, recipe: Any, available: int = 0) -> list[tuple[Change, int]]:
    """Changes to the recipe that save at least 2 % of the total, and the bytes each saves; the least harmful first.

    First what changes no result, then what rounds otherwise, then another method's base, then shorter rows.

    Args:
        estimate_: An estimate from ``estimate``.
        recipe: The recipe, from which the current values are read.
        available: Bytes with which a change that has degrees goes no further.
    """
    request = estimate_.request
    saved = [
        (change, estimate_.total - estimate(change.of(request)).total)
        for change in _changes(request, recipe, available)
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
    request = estimate_.request
    together, needed = _together(_changes(request, recipe, certain(available)), request, available)
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


def _together(changes: Sequence[Change], request: Request, available: int) -> tuple[tuple[Change, ...], int]:
    """The least harmful changes with which a run fits, and the bytes it needs then; else those that save most.

    Sets are tried in the order of binary numbers whose highest digit is the most harmful change, so that it is left
    out where it can be, and so on down.
    """
    least: tuple[tuple[Change, ...], int] | None = None
    for number in range(1, 2 ** len(changes)):
        chosen = tuple(change for digit, change in enumerate(changes) if number >> digit & 1)
        fields = [name for change in chosen for name in change.fields]
        if len(set(fields)) < len(fields):
            continue  # two values for one thing
        needed = estimate(reduce(lambda asked, change: change.of(asked), chosen, request)).total
        if needed <= certain(available):
            return chosen, needed
        if least is None or needed < least[1]:
            least = chosen, needed
    return least or ((), estimate(request).total)


def _changes(request: Request, recipe: Any, available: int) -> list[Change]:
    """Changes to a recipe that save memory and that its engine can run, the least harmful first."""
    changes = [
        *_same_result(request, recipe, available),
        *_other_rounding(request),
        *_other_base(request),
        *_shorter_rows(request, recipe),
    ]
    return [change for change in changes if _runs(change.of(request), recipe)]


def _same_result(request: Request, recipe: Any, available: int) -> Iterator[Change]:
    """Recomputed blocks, and less in one forward pass."""
    method, rows, layers = request.method, request.rows, request.shape.layers
    if request.recomputed_blocks < layers and method.recomputable:
        yield _change("training.gradient_checkpointing: true", {"recomputed_blocks": layers})
    if rows > 1 and not method.updates_in_backward:
        steps = recipe.training.accumulation * rows
        yield Change(
            f"training.micro_batch_size: 1 with gradient_accumulation_steps: {steps}",
            ("training.micro_batch_size=1", f"training.gradient_accumulation_steps={steps}"),
            {"rows": 1},
            Fraction(1, rows),
        )
    if request.longest is not None and request.longest < request.length:
        fewer = _fewer_at_once(request, available)
        tokens = fewer.fields["length"]
        yield replace(
            fewer,
            text=f"training.micro_batch_tokens: {tokens}, which changes no result",
            settings=(f"training.micro_batch_tokens={tokens}",),
        )


def _other_rounding(request: Request) -> Iterator[Change]:
    """Smaller optimizer state, and 16 bits."""
    if request.optimizer in ("adamw", "paged_adamw"):
        yield _change("optimizer.name: adamw_8bit", {"optimizer": "adamw_8bit"})
    if request.dtype_bytes == 4:
        slower = ", slower on a CPU without bfloat16" if request.device_type == "cpu" else ""
        yield Change(f"model.dtype: bfloat16{slower}", ("model.dtype=bfloat16",), {"dtype_bytes": 2})


def _other_base(request: Request) -> Iterator[Change]:
    """The method's own lighter settings, and a base in 4 bits."""
    method = request.method
    for text, lighter in method.lighter():
        before, after = (each.model_dump(mode="json") for each in (method, lighter))
        settings = [f"method.{name}={_yaml(after[name])}" for name in after if after[name] != before[name]]
        if lighter.updates_in_backward and not method.updates_in_backward:
            settings += ["training.gradient_accumulation_steps=1", "training.max_grad_norm=null"]
        fields: dict[str, Any] = {"method": lighter}
        if request.dtype_bytes == 4 and stored_bytes(lighter, 4) < 4:  # 16-bit weights compute in nothing larger
            fields, text = fields | {"dtype_bytes": 2}, f"{text}, with model.dtype: bfloat16"
            settings.append("model.dtype=bfloat16")
        yield Change(text, tuple(settings) or (_setting(text),), fields)
    if method.quantizable and method.base_quantization is None:
        smaller = method.model_copy(update={"quantization": Quantization()})
        yield _change("method.quantization: {type: nf4}", {"method": smaller})
    elif method.base_quantization is None:
        # The method whose base is 4-bit unless it is told otherwise.
        small = [n for n, cls in METHODS.items() if getattr(cls.model_fields.get("quantization"), "default", None)]
        for name in small[:1]:
            yield _change(f"method: {name}", {"method": METHODS[name]()})


def _shorter_rows(request: Request, recipe: Any) -> Iterator[Change]:
    """Half of the length at which rows are cut."""
    length, longest = request.length, request.longest
    shorter = recipe.data.max_length // 2
    if (longest is None or longest >= length) and shorter >= 128 and (padded := padded_length(shorter)) < length:
        fields = {"length": padded, "longest": longest and padded}
        yield replace(_change(f"data.max_length: {shorter}", fields), targets_left=Fraction(padded, length))


def _change(text: str, fields: dict[str, Any]) -> Change:
    return Change(text, (_setting(text),), fields)


def _setting(text: str) -> str:
    return text.replace(": ", "=", 1)


def _yaml(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _fewer_at_once(request: Request, available: int) -> Change:
    """Half as many tokens in a forward pass, and half again, until they fit or the longest row fills one."""
    assert request.longest is not None
    fewer = request.length
    while True:
        fewer = max(request.longest, padded_length(fewer // 2))
        change = Change("", (), {"length": fewer}, Fraction(fewer, request.length))
        if fewer == request.longest or estimate(change.of(request)).total <= available:
            return change


def _runs(request: Request, recipe: Any) -> bool:
    """Whether the engine can run a recipe once it is changed."""
    if request.engine == "ddp":
        return True
    optimizer = recipe.optimizer.model_copy(update={"name": request.optimizer})
    changed = recipe.model_copy(update={"method": request.method, "optimizer": optimizer})
    return not any(request.method.engine_problems(changed, request.engine))
