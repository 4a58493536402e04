"""A study's pictures, as SVG that takes its colours from the page around it; the same bytes every time."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftune.artifacts.need import need
from ftune.experiments.markdown import best_first, is_chosen
from ftune.human import bytes_text, time_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COSTS", "against_cost", "curves", "differences", "forest", "losses", "rates", "rewound"]

INK, ACCENT, MUTED = "#010203", "#040506", "#070809"
"""Colours that nothing else has: each is replaced by one of the page's."""
_IN_PAGE = {INK: "currentColor", ACCENT: "var(--accent)", MUTED: "var(--muted)"}
COSTS = {
    "memory": ("peak memory", bytes_text),
    "time": ("time of a run", time_text),
    "size": ("size", bytes_text),
    "forgetting": ("loss gained on neutral text, nats a token", "{:+.3f}".format),
}
OUTLIER = 3.0
"""A scale ends above nine tenths of the losses where the largest is so many times as far from the smallest."""
PANEL = (3.4, 2.3)
"""Inches of one small picture of several."""


def differences(result: Mapping[str, Any]) -> str:
    """Paired differences from LoRA with their intervals, best first, and the margin (a forest plot)."""
    rows = [(name, one["difference"], one["relation"] is not None) for name, one in best_first(result)]
    return forest(rows, f"{result['metric']}, points more than LoRA (95 %)", result["margin"])


def forest(rows: Sequence[tuple[str, Mapping[str, float], bool]], label: str, margin: float = 0.0) -> str:
    """Differences with their intervals, one under the other.

    Args:
        rows: Of each its name, ``d``, ``lo`` and ``hi`` as shares of 1, and whether it is filled.
        label: Below the axis.
        margin: Half the width of the grey band around 0, a share of 1.
    """
    figure, axes = _figure(5.2, 0.9 + 0.3 * len(rows))
    axes.axvspan(-100 * margin, 100 * margin, color=MUTED, alpha=0.25, lw=0)
    axes.axvline(0, color=INK, lw=0.8)
    for place, (_, one, filled) in enumerate(rows):
        d, lo, hi = (100 * one[end] for end in ("d", "lo", "hi"))
        color = ACCENT if filled else MUTED
        axes.plot([lo, hi], [place, place], color=color, lw=1.5, solid_capstyle="butt")
        axes.plot([d], [place], "o", color=color, ms=5, mfc=ACCENT if filled else "none")
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
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


def rewound(result: Mapping[str, Any]) -> list[str]:
    """Quality against forgetting along each run (thin) and along the scale of its end (thick); the best is large."""
    pictures = []
    for method in result["methods"]:
        found = method.get("rewind")
        if not found or not found["points"]:
            continue
        figure, axes = _figure(*PANEL)
        along_run = [point for point in found["points"] if point["scale"] == 1]
        along_scale = [point for point in found["points"] if point["step"] == result["steps"]]
        for points, color, width in ((along_run, MUTED, 1), (along_scale, ACCENT, 2)):
            places = [(point["forgetting"], 100 * point["quality"]) for point in points]
            axes.plot(*zip(*places, strict=True), marker="o", ms=4, color=color, lw=width)
        axes.plot([found["best"]["forgetting"]], [100 * found["best"]["quality"]], "o", ms=9, color=INK, mfc="none")
        axes.set_title(method["label"], color=INK, fontsize=10)
        axes.set_xlabel(COSTS["forgetting"][0])
        axes.set_ylabel(f"{result['metric']} %")
        pictures.append(_svg(figure))
    return pictures


def _for_each_method(
    result: Mapping[str, Any], label: str, draw: Callable[[Axes, Mapping[str, Any]], None]
) -> list[str]:
    """Small pictures of held-out losses of each method's trials."""
    measured = [loss for method in result["methods"] for trial in method["trials"] for loss in trial["losses"].values()]
    return _panels([(m["label"], m) for m in result["methods"]], measured, (label, "held-out loss"), draw)


def curves(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Training loss by step, thin, and held-out loss, thick, a picture for each run.

    Args:
        runs: Each with its ``label``, and with ``curves``: ``train`` and ``held_out``, lists of steps with a loss.
    """

    def draw(axes: Axes, run: Mapping[str, Any]) -> None:
        styles: dict[str, dict[str, Any]] = {
            "train": {"color": MUTED, "lw": 1},
            "held_out": {"color": ACCENT, "lw": 2, "marker": "."},
        }
        for name, style in styles.items():
            points = [(step, math.nan if loss is None else loss) for step, loss in run["curves"][name]]
            marker = {"marker": "."} if len(points) == 1 else {}
            axes.plot([step for step, _ in points], [loss for _, loss in points], **{**style, **marker})

    measured = [loss for run in runs for name in run["curves"] for _, loss in run["curves"][name] if loss is not None]
    return _panels([(run["label"], run) for run in runs], measured, ("step", "loss"), draw)


def _panels(
    named: Sequence[tuple[str, Mapping[str, Any]]],
    measured: Sequence[float],
    labels: tuple[str, str],
    draw: Callable[[Axes, Mapping[str, Any]], None],
) -> list[str]:
    """Small pictures of losses with one scale; what diverged may be above it."""
    finite = sorted(filter(math.isfinite, measured))
    drawn = []
    for name, shown in named:
        figure, axes = _figure(*PANEL)
        draw(axes, shown)
        if finite:
            low, high = finite[0], finite[int(0.9 * (len(finite) - 1))]
            if finite[-1] - low <= OUTLIER * (high - low):
                high = finite[-1]
            room = 0.1 * (high - low) or 0.1
            axes.set_ylim(low - room, high + room)
        axes.set_title(name, color=INK, fontsize=10)
        axes.set_xlabel(labels[0])
        if labels[0] == "step":
            axes.xaxis.set_major_locator(need("matplotlib.ticker").MaxNLocator(nbins=6, integer=True))
        axes.set_ylabel(labels[1])
        drawn.append(_svg(figure))
    return drawn


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
    if {score for _, scores, _ in points for score in scores} == {100 * result["base"]["score"]}:
        axes.set_ylim(scores[0] - 1, scores[0] + 1)  # or the axis would show rounding
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
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # the same in every picture
    for color, name in _IN_PAGE.items():
        text = text.replace(color, name)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)
