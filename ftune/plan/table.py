"""The plan as plain text: what a run will do, and whether it fits."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from ftune.human import bytes_text, time_text
from ftune.memory.estimate import ITEMS

__all__ = ["render_plan"]

LABEL = 12  # columns of the label in front of every line
ITEM = 14  # columns of a name inside the memory block
BAR = 30  # columns of the largest bar


def render_plan(plan: dict[str, Any], width: int) -> str:
    """Render a plan as aligned text without colour.

    Args:
        plan: The plan's summary, as kept in ``run.json``; a key that is absent or None is left out.
        width: Columns; lines are wrapped to it. At least 72 are used.

    Returns:
        Lines without trailing blanks, ended by a newline.
    """
    width = max(72, width)
    lines: list[str] = []
    for label, texts in _sections(plan):
        lines += _block(label, texts, width)
    if plan.get("memory"):
        lines += ["", *_memory(plan, width)]
    for label, texts in (("to fit", plan.get("advice") or []), ("warning", plan.get("warnings") or [])):
        if texts:
            lines.append("")
        for text in texts:
            lines += _block(label, [text], width)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _block(label: str, texts: list[str], width: int) -> list[str]:
    """One labelled paragraph: phrases joined by commas, wrapped under their own start."""
    return textwrap.wrap(
        ", ".join(texts),
        width,
        initial_indent=f"{label:{LABEL}}",
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _sections(plan: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for label, phrases in (
        ("model", _model(plan.get("model") or {})),
        ("method", _method(plan.get("method") or {})),
        ("trains", _trains(plan.get("model") or {}, plan.get("method") or {})),
        ("data", _data(plan.get("data") or {})),
        ("packing", _packing(plan.get("data") or {})),
        ("held out", _held_out(plan.get("data") or {})),
        ("steps", _steps(plan.get("training") or {})),
        ("optimizer", _optimizer(plan.get("training") or {})),
        ("by default", _chosen(plan.get("training") or {})),
        ("recomputed", _recomputed(plan.get("training") or {})),
        ("ranks", _ranks(plan.get("ranks") or {})),
        ("device", _device(plan)),
        ("time", _time(plan.get("time") or {}, plan.get("device") or {})),
    ):
        texts = [phrase for phrase in phrases if phrase]
        if texts:
            yield label, texts


def _say(value: Any, text: str) -> str:
    """``text`` with the value in it, thousands separated; nothing when there is no value."""
    return "" if value is None else text.format(value)


def _model(model: dict[str, Any]) -> Iterator[str]:
    name = model.get("id")
    yield f"{name} ({model['type']})" if name and model.get("type") else name or ""
    parameters = model.get("parameters")
    yield "" if parameters is None else f"{parameters:,} parameters"
    yield _say(model.get("vocab"), "vocabulary {:,}")


def _method(method: dict[str, Any]) -> Iterator[str]:
    yield method.get("name") or ""
    for key, value in (method.get("settings") or {}).items():
        if value not in (None, False, "", [], {}):
            yield f"{key} {_setting(value)}"


def _setting(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key} {_setting(item)}" for key, item in value.items() if item not in (None, False))
    if isinstance(value, list | tuple):
        return " ".join(_setting(item) for item in value)
    if value is True:
        return "on"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _trains(model: dict[str, Any], method: dict[str, Any]) -> Iterator[str]:
    trainable = method.get("trainable")
    if trainable is None:
        return
    yield f"{trainable:,} parameters"
    share = method.get("share")
    if share is None and model.get("parameters"):
        share = trainable / model["parameters"]
    yield "" if share is None else f"{share:.3%}" if share < 0.1 else f"{share:.1%}"


def _data(data: dict[str, Any]) -> Iterator[str]:
    yield _say(data.get("format"), "format {}")
    rows = _say(data.get("rows"), "{:,} documents" if data.get("documents") else "{:,} rows")
    files = data.get("files") or 1
    yield f"{rows} in {files:,} file{'s' if files > 1 else ''}" if files > 1 or data.get("documents") else rows
    yield _say(data.get("tokens"), "{:,} tokens")
    targets, tokens = data.get("target_tokens"), data.get("tokens")
    if targets is not None:
        yield f"{targets:,} in the loss" + (f" ({targets / tokens:.0%})" if tokens else "")
    yield _say(data.get("truncated") or None, "{:,} truncated")
    yield _say(data.get("split") or None, "{:,} split")
    yield _say(data.get("skipped") or None, "{:,} skipped")
    yield _say(data.get("no_target") or None, "{:,} without a target")
    yield _say(data.get("ends_with_eos"), "{:.0%} end in a learned end of turn")


def _packing(data: dict[str, Any]) -> Iterator[str]:
    if data.get("packing") is None:
        return
    yield "on" if data["packing"] else "off"
    if data["packing"]:
        yield _say(data.get("rows_packed"), "{:,} packed rows")
        yield _say(data.get("fill"), "{:.1%} filled")
    yield _say(data.get("max_length"), "at most {:,} tokens a row")


def _held_out(data: dict[str, Any]) -> Iterator[str]:
    if data.get("eval_rows") == 0:
        yield "none"
    if data.get("eval_rows"):
        yield f"{data['eval_rows']:,} rows"
        yield _say(data.get("eval_tokens"), "{:,} tokens")


def _steps(training: dict[str, Any]) -> Iterator[str]:
    yield _say(training.get("steps"), "{:,} updates")
    epochs = training.get("epochs")
    yield "" if epochs is None else f"{epochs:.3g} epochs" if epochs != 1 else "1 epoch"
    factors = [
        _say(training.get("micro_batch_size"), "{} in a micro-batch"),
        _say(training.get("gradient_accumulation_steps"), "{} accumulated"),
        _say(training.get("world_size") if training.get("world_size") != 1 else None, "{} processes"),
    ]
    product = " x ".join(factor for factor in factors if factor)
    batch = training.get("global_batch")
    if batch is not None:
        rows = "1 row" if batch == 1 else f"{batch:,} rows"
        yield f"{rows} an update" + (f" ({product})" if product else "")


def _optimizer(training: dict[str, Any]) -> Iterator[str]:
    yield training.get("optimizer") or ""
    yield _say(training.get("learning_rate"), "learning rate {:g}")
    yield training.get("schedule") or ""
    warmup = training.get("warmup_steps")
    yield _say(warmup, "{:,} step" + "s" * (warmup != 1) + " of warm-up")


def _chosen(training: dict[str, Any]) -> Iterator[str]:
    """What the recipe left out; to keep a value, it is written into the recipe as it stands here."""
    for choice in training.get("chosen") or []:
        value = choice["value"]
        shown = str(value).lower() if isinstance(value, bool) else _setting(value)
        yield f"{choice['field'].rpartition('.')[2]} {shown} ({choice['why']})"


def _recomputed(training: dict[str, Any]) -> Iterator[str]:
    blocks, of = training.get("recomputed_blocks"), training.get("blocks")
    if blocks is None or of is None:
        return
    share = "no block" if not blocks else f"all {of} blocks" if blocks == of else f"{blocks} of {of} blocks"
    why = training.get("recomputed_because")
    yield f"{share} in the backward pass" + (f": {why}" if why else "")


def _device(plan: dict[str, Any]) -> Iterator[str]:
    model, device = plan.get("model") or {}, plan.get("device") or {}
    kind, name = device.get("type"), device.get("name")
    yield f"{kind} ({name})" if kind and name and name != kind else kind or name or ""
    yield model.get("dtype") or ""
    available = device.get("available")
    yield "" if available is None else f"{bytes_text(available)} available"
    budget = plan.get("budget")
    yield "" if budget in (None, available) else f"held to {bytes_text(budget)}"


def _ranks(ranks: dict[str, Any]) -> Iterator[str]:
    if not ranks:
        return
    yield f"{ranks['processes']} of {ranks['engine']}"
    sent = ranks["sent_bytes_an_update"]
    names = [name for name in ("all_gather", "reduce_scatter", "all_reduce") if sent[name]]
    parts = ", ".join(f"{name.replace('_', '-')} {bytes_text(sent[name])}" for name in names)
    yield f"each sends {bytes_text(sent['total'])} an update" + (f" ({parts})" if len(names) > 1 else "")
    yield "the memory below is one rank's"
    host = ranks.get("host_bytes")
    yield f"and {bytes_text(host)} of the host's for its parts" if host else ""
    if loading := ranks.get("loading_bytes"):
        where = (
            "read through the host's memory" if ranks["through_host"] else f"whole on each rank, {bytes_text(loading)}"
        )
        yield f"before it is shared out the model is {where}"


def _time(time: dict[str, Any], device: dict[str, Any]) -> Iterator[str]:
    if not time:
        return
    parts = [f"updates {time_text(time['training'])}"]
    if count := time["evaluations"]:
        parts.append(f"{count} evaluations {time_text(time['evaluation'])}")
    kind = {"cpu": "CPU", "cuda": "GPU"}.get(device.get("type") or "", "device")
    source = (
        f"this {kind}'s measured speed in matmuls"
        if time.get("measured", True)
        else f"the data sheet of {device.get('name')}"
    )
    yield (
        f"about {time_text(time['seconds'])} ({', '.join(parts)}), from {source}: right to a factor of two where "
        "nothing else runs"
    )


def _memory(plan: dict[str, Any], width: int) -> list[str]:
    """The items, the largest bar for the total, and the verdict."""
    memory: dict[str, int] = plan["memory"]
    items = [(name, memory[name]) for name in ITEMS if memory.get(name)]
    total = memory.get("total") or sum(value for _, value in items)
    room = min(BAR, width - LABEL - ITEM - 22)
    lines = []
    for index, (name, value) in enumerate(items):
        label = "memory" if index == 0 else ""
        bar = "#" * max(1, round(room * value / total))
        lines.append(f"{label:{LABEL}}{name:{ITEM}}{bytes_text(value):>10} {value / total:>5.0%}  {bar}")
    lines.append(f"{'':{LABEL}}{'total':{ITEM}}{bytes_text(total):>10}  {_verdict(plan, total)}".rstrip())
    return lines


def _verdict(plan: dict[str, Any], total: int) -> str:
    fits = plan.get("fits")
    budget = plan.get("budget")
    if fits is None:
        return ""
    if budget is None:
        return "fits" if fits else "does not fit"
    if not fits and total <= budget:
        return f"does not fit while it loads: {bytes_text(plan['ranks']['loading_bytes'] - budget)} too much"
    if plan.get("tight"):
        return f"may just fit: {bytes_text(budget - total)} to spare, and a peak is predicted to 5 % or so"
    if fits:
        return f"fits: {bytes_text(budget - total)} to spare"
    return f"does not fit: {bytes_text(total - budget)} too much"
