"""Every method on one recipe, before any training: what it trains, needs and takes, and whether it fits."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftune.artifacts.report import table
from ftune.errors import FtuneError
from ftune.experiments.trials import plain, reason, recipe_text
from ftune.human import bytes_text, time_text
from ftune.plan.machine import Machine
from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of
from ftune.recipe import Loaded, parse_recipe, require
from ftune.recipe.other_method import of_another_method

if TYPE_CHECKING:
    from ftune.plan.devices import Device

__all__ = ["Fit", "fits", "fits_table"]


@dataclass(frozen=True)
class Fit:
    """A method on a recipe.

    Attributes:
        method: Its name.
        verdict: Whether its run fits into the memory; None where it cannot work at all.
        why: Why it cannot work, or what would make it fit, as options to copy.
        bytes: Predicted peak.
        trainable: Parameters that it trains.
        seconds: Predicted time of a run; None where the device's speed is not known.
        rate: Learning rate of a run.
    """

    method: str
    verdict: Literal["fits", "may just fit", "does not fit"] | None
    why: str
    bytes: int | None = None
    trainable: int | None = None
    seconds: float | None = None
    rate: float | None = None


def fits(
    loaded: Loaded, methods: Sequence[str], *, sizes: Path | None = None, target: Device | None = None
) -> list[Fit]:
    """Plan a recipe with each of several methods in place of its own.

    Args:
        loaded: The recipe; of its method's settings each method keeps those that it takes, and its own rate unless it
            is the recipe's.
        methods: Names.
        sizes: Plan for another model's sizes.
        target: Plan for this device.

    Returns:
        One for each method, in their order.
    """
    machine = Machine.of(target) if target else Machine.here()
    return [_fit(loaded, name, sizes, machine) for name in methods]


def _fit(loaded: Loaded, name: str, sizes: Path | None, machine: Machine) -> Fit:
    raw: dict[str, Any] = plain(loaded.raw)
    if name != loaded.recipe.method.name:
        raw["method"] = plain(of_another_method(raw, name)[0])
        if isinstance(raw.get("optimizer"), dict):
            raw["optimizer"].pop("learning_rate", None)
    try:
        made = parse_recipe(recipe_text(raw), f"recipe with `{name}`")
        require(made)
        summary = summary_of(resolve(made.recipe, sizes=sizes, machine=machine))
    except FtuneError as error:
        return Fit(name, None, reason(error))
    verdict: Literal["fits", "may just fit", "does not fit"] = "may just fit" if summary["tight"] else "fits"
    if not summary["fits"]:
        verdict = "does not fit"
    return Fit(
        name,
        verdict,
        summary["advice"][-1] if verdict != "fits" and summary["advice"] else "",
        summary["memory"]["total"],
        summary["method"]["trainable"],
        None if summary["time"] is None else summary["time"]["seconds"],
        summary["training"]["learning_rate"],
    )


def fits_table(found: Sequence[Fit], width: int) -> str:
    """The methods that fit, least memory first; then the others, each with what to do or why not, wrapped."""
    order = {"fits": 0, "may just fit": 1, "does not fit": 2, None: 3}
    ordered = sorted(found, key=lambda fit: (order[fit.verdict], fit.bytes or 0))
    rows = [
        [
            fit.method,
            fit.verdict or "cannot",
            "-" if fit.bytes is None else bytes_text(fit.bytes),
            "-" if fit.seconds is None else time_text(fit.seconds),
            "-" if fit.trainable is None else f"{fit.trainable:,}",
            "-" if fit.rate is None else f"{fit.rate:g}",
        ]
        for fit in ordered
    ]
    text = table(("method", "", "memory", "time", "parameters", "rate"), rows, right=(2, 3, 4, 5))
    wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    notes = [wrap.fill(f"{fit.method}: {fit.why}") for fit in ordered if fit.why]
    return "\n".join([text, *([""] if notes else []), *notes])
