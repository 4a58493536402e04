"""What commands print when they are done: plain text tables."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ftune.artifacts.terminal import clip, width_of
from ftune.human import bytes_text, time_text

__all__ = [
    "convert_summary",
    "evaluation_table",
    "merge_summary",
    "table",
    "task_score",
    "task_table",
    "training_summary",
]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns as wide as their widest cell, two spaces apart; the columns in ``right`` are right-aligned."""
    widths = [max(width_of(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        blanks = [" " * (width - width_of(cell)) for cell, width in zip(cells, widths, strict=True)]
        padded = (b + c if i in right else c + b for i, (b, c) in enumerate(zip(blanks, cells, strict=True)))
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, rows)])


def training_summary(record: dict[str, Any], output_dir: str, width: int) -> str:
    """What was reached, predicted against measured memory, and the vitals, wrapped to ``width``; then where it is."""
    measured, method = record["measured"], record["plan"]["method"]
    saved = f"saved: {output_dir}/{method['artifact']}"
    paused = record.get("status") == "paused"
    if not measured:
        return f"{'paused: --resume goes on' if paused else saved} (every step had been made before)"
    if paused:
        steps = record["plan"]["training"]["steps"]
        return f"paused after step {measured['steps']} of {steps}{_held_out(measured)}: --resume goes on"
    effect = record.get("effect") or {"verdict": "unknown"}
    lines = [
        f"done: {measured['steps']} steps in {time_text(measured['wall_seconds'])}, "
        f"{measured['tokens_per_second']:,.0f} tokens/s, loss {measured['first_loss']:.4f} -> {measured['loss']:.4f}"
        + _held_out(measured),
        f"peak memory {bytes_text(measured['peak_bytes'])}, predicted "
        f"{bytes_text(measured['predicted_peak_bytes'])} ({measured['predicted_over_measured']:.2f} x)",
    ]
    if record["vitals"]:
        label = "vitals" if effect["verdict"] in ("worse", "hardly_moved") else "at work"
        lines.append(f"{label}: {record['vitals_line']}")
    lines += _effect(effect)
    wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join([*map(wrap.fill, lines), saved])


def _held_out(measured: dict[str, Any]) -> str:
    after, before = measured.get("held_out_loss"), measured.get("base_loss")
    if after is None:
        return ""
    return ", held-out " + (f"{before:.4f} -> " if before is not None else "") + f"{after:.4f}"


def _effect(effect: dict[str, Any]) -> list[str]:
    """What to say of a run that did not make the model better."""
    change = {"worse": "worse than before", "hardly_moved": "hardly better than before"}.get(effect["verdict"])
    if change is None:
        return []
    losses = f"{effect['of']} loss {effect['before']:.4f} -> {effect['after']:.4f}"
    return [f"warning: the model is {change} training ({losses}): {'; '.join(effect['advice'])}"]


def evaluation_table(result: dict[str, Any], width: int) -> str:
    """Base and tuned side by side, with the difference; then a few answers."""
    who = [name for name in ("base", "tuned") if name in result]
    names = ["held-out loss", "perplexity", *result[who[0]].get("metrics", {})] if who else []

    def value(model: str, name: str) -> float:
        numbers = result[model]
        if name == "held-out loss":
            return float(numbers["loss"])
        return float(numbers["perplexity"] if name == "perplexity" else numbers["metrics"][name])

    def show(number: float, name: str, sign: str = "") -> str:
        if name in ("held-out loss", "perplexity"):
            return f"{number:{sign}.3f}"
        return f"{100 * number:{sign}.1f}" + (" pt" if sign else " %")

    rows = []
    for name in names:
        row = [name, *(show(value(model, name), name) for model in who)]
        if len(who) == 2:
            row.append(show(value("tuned", name) - value("base", name), name, "+"))
        rows.append(row)
    head = ["", *who, *(["change"] if len(who) == 2 else [])]
    parts = [table(head, rows, right=range(1, len(head)))] if who else []
    lines = [_counts(result)] if who else []
    if result.get("predictions"):
        lines.append(f"every answer and its scores: {result['predictions']}")
    lines += [f"warning: {note}" for note in result["notes"]]
    parts += [_wrapped(lines, width)] if lines else []
    if "tasks" in result:
        parts.append(_tasks(result, width))
    if "forgetting" in result:
        parts.append(_forgetting(result["forgetting"]))
    text = "\n\n".join(parts)
    for name in who:
        if "classes" in result[name]:
            text += f"\n\n{_confusion(name, result[name]['classes'], width)}"
    for sample in result["samples"][:3]:
        text += f"\n\n  reference  {clip(sample['reference'], width - 13)}"
        for name in who:
            text += f"\n  {name:9}  {clip(sample[name], width - 13)}"
    return text


def _wrapped(lines: Sequence[str], width: int) -> str:
    wrap = textwrap.TextWrapper(width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(map(wrap.fill, lines))


def _tasks(result: dict[str, Any], width: int) -> str:
    """Scores on tasks of lm-evaluation-harness, and how they were made."""
    found = result["tasks"]
    shown = [row for row in found["rows"] if row["shown"]]
    head, rows = task_table(shown)
    room = width - max(map(width_of, table(head, [["", *row[1:]] for row in rows]).splitlines())) + len(head[0])
    rows = [[clip(row[0], max(8, room)), *row[1:]] for row in rows]
    shots = sorted({row["shots"] for row in shown})
    lines = [
        f"lm-evaluation-harness {found['harness']}: "
        + ("all items" if found["limit"] is None else f"the first {found['limit']:,} items of each task")
        + f", {' to '.join(map(str, dict.fromkeys((shots[0], shots[-1]))))} solved examples before each, prompts "
        + ("in the run's chat template" if found["chat_template"] else "as the task has them, without a chat template")
    ]
    if parts := len(found["rows"]) - len(shown):
        lines.append(f"{parts} scores of the groups' parts: in eval.json, and with --json")
    if worse := sorted({f"{row['task']} {row['metric']}" for row in shown if row["lower_is_better"]}):
        lines.append(f"lower is better: {', '.join(worse)}")
    if found["prompts_cut"]:
        lines.append(
            f"warning: {found['prompts_cut']:,} prompts lost their beginning: the model's context is "
            f"{found['context']:,} tokens"
        )
    if "task_items" in result:
        lines.append(f"every item and its scores: {result['task_items']}")
    return table(head, rows, right=range(2, len(head))) + "\n\n" + _wrapped(lines, width)


def task_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of scores on tasks: base and tuned where they are there, and the difference of the two."""
    who = [name for name in ("base", "tuned") if name in rows[0]]
    head = ["task", "metric", "n", *who, *(["difference [95 %]"] if len(who) == 2 else [])]
    return head, [
        [
            row["task"],
            row["metric"],
            f"{row['n']:,}",
            *(task_score(row, name) for name in who),
            *([_task_difference(row)] if len(who) == 2 else []),
        ]
        for row in rows
    ]


def task_score(row: Mapping[str, Any], who: str) -> str:
    """A score on a task: in percent where it is a share."""
    value = row[who]
    return "-" if value is None else f"{100 * value:.1f} %" if row["share"] else _number(value)


def _task_difference(row: Mapping[str, Any]) -> str:
    d, lo, hi = row["difference"]
    if d is None:
        return "-"
    shown = [_number(x, "+") if not row["share"] else f"{100 * x:+.1f}" for x in (d, lo, hi) if x is not None]
    unit = " pt" if row["share"] else ""
    return f"{shown[0]}{unit} [{shown[1]}, {shown[2]}]" if lo is not None else f"{shown[0]}{unit}"


def _number(value: float, sign: str = "") -> str:
    """Three decimals; of a perplexity that is far off, three digits."""
    return f"{value:{sign}.3f}" if abs(value) < 1e5 else f"{value:{sign}.3g}"


def _forgetting(found: dict[str, Any]) -> str:
    """What of the base's knowledge is lost: both models, and the change with its 95 % interval."""
    base, tuned = found["base"], found["tuned"]
    loss, choices = found["loss"], [100 * share for share in found["choices"]]
    rows = [
        ["loss", f"{base['loss']:.3f}", f"{tuned['loss']:.3f}", "{:+.3f} [{:+.3f}, {:+.3f}]".format(*loss)],
        [
            "questions right",
            *(f"{100 * one['choices']:.1f} %" for one in (base, tuned)),
            "{:+.1f} pt [{:+.1f}, {:+.1f}]".format(*choices),
        ],
        ["KL from the base", "", f"{found['kl']:.3f}", "nats a token"],
    ]
    return (
        table(["forgetting", "base", "tuned", "change [95 %]"], rows, right=(1, 2))
        + f"\n\nneutral text of ftune's own: {found['tokens']:,} tokens, {found['questions']} questions"
    )


def _counts(result: dict[str, Any]) -> str:
    """On which rows loss and metrics were measured."""

    def rows(count: int) -> str:
        return f"{count:,} held-out row{'s' * (count != 1)}"

    examples, generated, left_out = result["examples"], result["generated"], result["prompts_too_long"]
    if not generated:
        return rows(examples)
    if generated == examples:
        same = "the same " if examples != 1 else ""
        text = f"loss and metrics on {same}{rows(examples)}; answers generated greedily"
    else:
        text = f"loss on {rows(examples)}, metrics on {generated:,} of them; answers generated greedily"
    prompts = f"{left_out:,} prompt{'s' * (left_out != 1)}"
    return text + (f"; {prompts} left out: empty, or longer than the model's context" if left_out else "")


def _confusion(name: str, classes: dict[str, Any], width: int) -> str:
    """What was answered (columns) for each class of the references (rows), as far as the width allows."""
    labels, counts = list(classes["labels"]), classes["confusion"]
    room = max(6, min(20, width // 5))
    head = [f"{name}: right answer", *(clip(label, room) for label in labels), "other"]
    rows = [[clip(label, room), *map(str, row)] for label, row in zip(labels, counts, strict=True)]
    shown = table(head, rows, right=range(1, len(head)))
    if max(map(width_of, shown.splitlines())) <= width:
        return shown
    wrong = sorted(
        ((count, labels[i], labels[j] if j < len(labels) else "other") for i, row in enumerate(counts)
         for j, count in enumerate(row) if i != j and count), reverse=True
    )  # fmt: skip
    lines = [f"{name}: {len(labels)} classes; what was taken for what most often (all of it is in eval.json):"]
    lines += [f"  {clip(right, room)} -> {clip(said, room)}  {count}" for count, right, said in wrong[:10]]
    return "\n".join(lines)


def merge_summary(report: dict[str, Any]) -> str:
    """Where the merged model is and how close it is to what was trained."""
    if report.get("by_shard"):
        return _by_shard_summary(report)
    found, effect = report["merged_vs_adapter"], report["base_vs_adapter"]
    return (
        f"merged{_what(report)}: {report['out']} ({report['dtype']}, {bytes_text(report['bytes'])})\n"
        f"in fp32, before rounding, the largest difference of a logit is {report['merge_error']:.2g}\n\n"
        + _divergence_table((("merged, from disk", found), ("base model", effect)))
        + f"\n\n{report['tokens_compared']} tokens of real text compared"
    )


def _what(report: dict[str, Any]) -> str:
    """Which checkpoint was merged, and how much of the change, where it is not all of the end."""
    step = f" {report['checkpoint']}" if report["checkpoint"] else ""
    return step + (f" at scale {report['scale']:g}" if report["scale"] < 1 else "")


def _by_shard_summary(report: dict[str, Any]) -> str:
    """What was compared where the model was never whole, and what was not."""
    files = f"{report['shards']} file{'s' * (report['shards'] != 1)}"
    size = f"{report['dtype']}, {bytes_text(report['bytes'])} in {files}"
    lines = [f"merged{_what(report)} shard by shard: {report['out']} ({size})"]
    if report["layers_compared"]:
        rows = [("written", report["written_vs_adapter"]), ("base model", report["base_vs_adapter"])]
        body = [
            [name, f"{found['overall']:.2g}", f"{found['largest']:.2g}" if "largest" in found else ""]
            for name, found in rows
        ]
        lines += ["", table(["error of layers' outputs", "all layers", "worst layer"], body, right=(1, 2)), ""]
    lines += [f"verified: {what}" for what in report["verified"] if not what.startswith("0 ")]
    return "\n".join(lines + [f"not verified: {what}" for what in report["not_verified"]])


def convert_summary(report: dict[str, Any]) -> str:
    """Where the LoRA adapter is and how close it is to what was trained."""
    found, effect = report["lora_vs_tuned"], report["base_vs_tuned"]
    kind = "exact" if report["exact"] else "an approximation"
    if report["rank_asked_for"] not in (None, report["rank"]):
        kind += f"; no more than rank {report['rank']} is needed"
    note = "\nthe adapter fits the 4-bit base that it was trained on: on the original weights it is another model"
    return (
        f"converted: {report['out']} (plain LoRA of rank {report['rank']}, {bytes_text(report['bytes'])}, {kind})\n\n"
        + _divergence_table((("LoRA adapter, from disk", found), ("base model", effect)))
        + f"\n\n{report['tokens_compared']} tokens of real text compared, in fp32"
        + (note if report["quantized_base"] else "")
    )


def _divergence_table(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """How far models are from the tuned one."""
    return table(
        ["against the tuned model", "max |dlogit|", "KL, nats/token", "same top token"],
        [[name, f"{d['max_error']:.2g}", f"{d['kl']:.2g}", f"{100 * d['top1']:.1f} %"] for name, d in rows],
        right=(1, 2, 3),
    )
