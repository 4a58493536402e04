"""A study's pictures, as SVG that takes its colours from the page around it; the same bytes every time."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ftune.experiments.markdown import best_first, is_chosen
from ftune.experiments.need import need
from ftune.human import bytes_text, time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COSTS", "against_cost", "differences", "losses", "rates"]

INK, ACCENT, MUTED = "#010203", "#040506", "#070809"
"""Colours that nothing else has: each is replaced by one of the page's."""
_IN_PAGE = {INK: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)"}
COSTS = {
    "memory": ("peak memory", bytes_text),
    "time": ("time of a run", time_text),
    "size": ("size", bytes_text),
    "forgetting": ("loss gained on neutral text, nats a token", "{:+.3f}".format),
}
PANEL = (3.4, 2.3)
"""Inches of one small picture of several."""


def differences(result: Mapping[str, Any]) -> str:
    """Paired differences from LoRA with their intervals, best first, and the margin (a forest plot)."""
    compared = best_first(result)
    names = [name for name, _ in compared]
    figure, axes = _figure(5.2, 0.9 + 0.3 * len(names))
    margin = 100 * result["margin"]
    axes.axvspan(-margin, margin, color=MUTED, alpha=0.25, lw=0)
    axes.axvline(0, color=INK, lw=0.8)
    for place, (_, one) in enumerate(compared):
        d, lo, hi = (100 * one["difference"][end] for end in ("d", "lo", "hi"))
        ranked = one["relation"] is not None
        axes.plot([lo, hi], [place, place], color=ACCENT if ranked else MUTED, lw=1.5, solid_capstyle="butt")
        axes.plot([d], [place], "o", color=ACCENT if ranked else MUTED, ms=5, mfc=ACCENT if ranked else "none")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"{result['metric']}, points more than LoRA (95 %)")
    return _svg(figure)


def rates(result: Mapping[str, Any]) -> list[str]:
    """Held-out loss by learning rate, a picture for each method; trials that were stopped early are hollow."""

    def draw(axes: Axes, method: Mapping[str, Any]) -> None:
        axes.set_xscale("log")
        for trial in method["trials"]:
            if trial["losses"]:
                last = max(trial["losses"], key=int)
                color, fill = (ACCENT, ACCENT) if int(last) == result["steps"] else (MUTED, "none")
                size = 8 if is_chosen(trial, method) else 4
                axes.plot([trial["rate"]], [trial["losses"][last]], "o", ms=size, color=color, mfc=fill)
        ticker = need("matplotlib.ticker")
        axes.xaxis.set_major_locator(ticker.LogLocator(numticks=5))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())

    return _for_each_method(result, "learning rate", draw)


def losses(result: Mapping[str, Any]) -> list[str]:
    """Held-out loss by step of every trial, a picture for each method; the chosen one is drawn thick."""

    def draw(axes: Axes, method: Mapping[str, Any]) -> None:
        for trial in method["trials"]:
            points = sorted((int(step), loss) for step, loss in trial["losses"].items())
            chosen = is_chosen(trial, method)
            style: dict[str, Any] = {"color": ACCENT if chosen else MUTED, "lw": 2 if chosen else 1}
            axes.plot([step for step, _ in points], [loss for _, loss in points], marker=".", **style)

    return _for_each_method(result, "step", draw)


def _for_each_method(
    result: Mapping[str, Any], label: str, draw: Callable[[Axes, Mapping[str, Any]], None]
) -> list[str]:
    """Small pictures of held-out losses with one scale; what diverged may be above it."""
    measured = sorted(
        loss
        for method in result["methods"]
        for trial in method["trials"]
        for loss in trial["losses"].values()
        if math.isfinite(loss)
    )
    pictures = []
    for method in result["methods"]:
        figure, axes = _figure(*PANEL)
        draw(axes, method)
        if measured:
            low, high = measured[0], measured[int(0.9 * (len(measured) - 1))]
            room = 0.1 * (high - low) or 0.1
            axes.set_ylim(low - room, high + room)
        axes.set_title(method["label"], color=INK, fontsize=10)
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss")
        pictures.append(_svg(figure))
    return pictures


def against_cost(result: Mapping[str, Any], cost: str) -> str | None:
    """Quality against a cost, each method with the range of its seeds; None where the cost was not measured."""
    name, text = COSTS[cost]
    points = [
        (value, [100 * run["score"] for run in method["runs"] if "score" in run], method["label"])
        for method in result["methods"]
        if (value := _cost(method, cost)) is not None and method["score"] is not None
    ]
    if not points:
        return None
    figure, axes = _figure(4.6, 3.2)
    for x, scores, label in sorted(points):
        mean = sum(scores) / len(scores)
        axes.plot([x, x], [min(scores), max(scores)], color=MUTED, lw=1.5)
        axes.plot([x], [mean], "o", color=ACCENT, ms=5)
        axes.annotate(label, (x, mean), xytext=(5, 3), textcoords="offset points", color=INK, fontsize=8)
    axes.axhline(100 * result["base"]["score"], color=MUTED, lw=0.8, ls="--")
    values = [x for x, _, _ in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
    shown = sorted({min(values), max(values)})
    axes.set_xticks(shown, [text(value) for value in shown])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.2, y=0.12)
    axes.set_xlabel(name)
    axes.set_ylabel(f"{result['metric']} %")
    return _svg(figure)


def _cost(method: Mapping[str, Any], cost: str) -> float | None:
    if cost == "forgetting":
        return method["forgetting"]["loss"][0] if method["forgetting"] else None
    value: float | None = method["costs"][cost]
    return value


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = need("matplotlib.figure").Figure((width, height), layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8, color=MUTED)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)


def _svg(figure: Figure) -> str:
    """The picture with text as text, sized by the page, without a date or random names."""
    matplotlib = need("matplotlib")
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ftune", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    for color, name in _IN_PAGE.items():
        text = text.replace(color, name)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)
