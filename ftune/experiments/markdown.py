"""A study's results as text: one table and the verdict for a terminal, and ``compare.md`` with all of it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftune.artifacts.report import table
from ftune.experiments.study import BASE, REFERENCE
from ftune.human import bytes_text, time_text

__all__ = [
    "best_first",
    "differences_table",
    "forecast_text",
    "is_chosen",
    "markdown",
    "overview",
    "paragraphs",
    "protocol_lines",
    "summary",
    "tuning_table",
]


USES = {"train": "to train on", "validation": "to choose by", "test": "for the report alone"}


def summary(result: Mapping[str, Any], root: str, width: int) -> str:
    """What a terminal shows at the end of a study."""
    head, rows = overview(result)
    if max(map(len, table(head, rows).splitlines())) > width:
        head, rows = head[:4], [row[:4] for row in rows]
    lines = [table(head, rows, right=range(1, len(head))), ""]
    lines += [textwrap.fill(text, width) for text in paragraphs(result)]
    lines.append(_time(result))
    return "\n".join([*lines, f"written: {root}/compare.html, compare.md, compare.json"])


def markdown(result: Mapping[str, Any], command: str) -> str:
    """``compare.md``: verdict, table, differences, tuning, runs, protocol."""
    head, rows = overview(result)
    parts = ["# Comparison of methods", "", *(f"{text}\n" for text in paragraphs(result)), *_table(head, rows)]
    parts += ["", "## Against LoRA", ""]
    parts += ["Paired by test row, 95 % intervals, in points; p by Holm over all methods (docs/statistics.md).\n"]
    parts += _table(*differences_table(result))
    parts += ["", "## Tuning: held-out loss by learning rate", ""]
    parts += ["The same number of rates for each method, around its own prior; `*` is the chosen one.\n"]
    parts += _table(*tuning_table(result))
    parts += ["", "## Runs", ""]
    parts += _table(("method", "seed", result["metric"], "loss", "run"), list(_runs(result)))
    parts += ["", "## Protocol", "", *protocol_lines(result, command), ""]
    return "\n".join(parts)


def forecast_text(forecast: Any, width: int) -> str:
    """What a study will take and what it can show, before it begins."""
    settled = forecast.settled
    rows = [
        [label, f"{speed['seconds']:.2f}", bytes_text(speed["bytes"]), f"{settled.priors[label]:g}"]
        for label in forecast.labels
        if (speed := forecast.speed.get(label))
    ]
    counts = ", ".join(
        f"{count:,} {use}{' (drawn)' if name in settled.drawn else ''}"
        for name, use in USES.items()
        if (count := settled.counts[name]) is not None
    )
    needed = "more seeds are needed for that, not more rows" if forecast.needed is None else f"{forecast.needed:,} rows"
    texts = [
        f"{forecast.runs} runs of {len(forecast.labels)} methods, {forecast.steps:,} steps in all, each run at most "
        f"{settled.steps} steps: about {time_text(forecast.seconds)} on one device",
        f"rows: {counts}",
        f"{settled.test_items:,} test rows can show a difference of {100 * forecast.detectable:.1f} points with 80 % "
        f"power; to show the margin: {needed}",
        *(f"left out: {label}: {why}" for label, why in settled.excluded.items()),
    ]
    if forecast.cut_from is not None:
        texts.append(
            f"so that it fits the budget, a run makes {settled.steps} of the recipe's {forecast.cut_from} steps"
        )
    head = table(("method", "s/step", "peak", "rate around"), rows, right=(1, 2, 3))
    return "\n".join([head, "", *(textwrap.fill(text, width) for text in texts)])


Table = tuple[Sequence[str], list[list[str]]]


def paragraphs(result: Mapping[str, Any]) -> list[str]:
    """The verdict and what else must be known, a paragraph each."""
    verdict = result["verdict"]
    said = ["No verdict: LoRA could not be trained." if verdict is None else str(verdict["sentence"])]
    for method in result["methods"]:
        said += [f"`{method['label']}` failed: {why}" for why in method["failures"]]
        if method["at_edge"] and method["label"] == REFERENCE:
            said.append(
                "LoRA's best rate is still at the edge of its grid: what is better than it may only be better tuned. "
                "Set `optimizer.learning_rate` in the recipe nearer to it."
            )
        elif method["at_edge"]:
            said.append(
                f"`{method['label']}` is not tuned and not ranked: its best rate is still at the edge of its grid"
            )
    said += [f"`{label}` was left out: {why}" for label, why in result["left_out"].items()]
    return said


def overview(result: Mapping[str, Any]) -> Table:
    """The table of methods, best first, with the base."""
    verdict = result["verdict"] or {"ties": [], "comparisons": {}}
    groups = verdict["ties"]
    base = result["base"]["score"]
    rows = [(base, [BASE, _points(base), "", _letters(BASE, groups), *["-"] * 5])]
    for method in result["methods"]:
        label, score, costs = method["label"], method["score"], method["costs"]
        scores = [run["score"] for run in method["runs"] if "score" in run]
        spread = f"{100 * min(scores):.1f} to {100 * max(scores):.1f}" if len(scores) > 1 else ""
        mark = "failed" if score is None else "not tuned" if method["at_edge"] else _letters(label, groups)
        rows.append(
            (
                -1.0 if score is None else score,
                [
                    label,
                    "-" if score is None else _points(score),
                    spread,
                    mark,
                    "-" if costs["memory"] is None else bytes_text(costs["memory"]),
                    "-" if costs["time"] is None else time_text(costs["time"]),
                    "-" if costs["size"] is None else bytes_text(costs["size"]),
                    "-" if method["forgetting"] is None else f"{method['forgetting']['loss'][0]:+.3f}",
                    "-" if method["rate"] is None else f"{method['rate']:g}",
                ],
            )
        )
    head = ("method", f"{result['metric']} %", "seeds", "ties", "memory", "time", "size", "forgets", "rate")
    return head, [row for _, row in sorted(rows, key=lambda row: (-row[0], row[1][0]))]


def _letters(label: str, groups: Sequence[Sequence[str]]) -> str:
    """The groups that a method is in: those that share a letter are not told apart."""
    return "".join(chr(ord("a") + i) for i, group in enumerate(groups) if label in group)


def differences_table(result: Mapping[str, Any]) -> Table:
    """Every method's paired difference from LoRA, best first."""
    return ("method", "difference", "from", "to", "p", "is"), list(_differences(result))


def tuning_table(result: Mapping[str, Any]) -> Table:
    """Every trial; ``*`` is the chosen one."""
    return ("method", "rate", "loss after", "loss", "quality"), list(_tuning(result))


def best_first(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every comparison with LoRA, the largest difference first."""
    compared = (result["verdict"] or {"comparisons": {}})["comparisons"]
    return sorted(compared.items(), key=lambda item: (-item[1]["difference"]["d"], item[0]))


def is_chosen(trial: Mapping[str, Any], method: Mapping[str, Any]) -> bool:
    """Whether a trial has the setting that its method was tuned to."""
    return bool((trial["rate"], trial["fields"]) == (method["rate"], method["searched"]))


def _differences(result: Mapping[str, Any]) -> Iterator[list[str]]:
    for label, one in best_first(result):
        d, p = one["difference"], one["adjusted_p"]
        yield [
            label,
            *(f"{100 * d[end]:+.1f}" for end in ("d", "lo", "hi")),
            "-" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001",
            one["relation"] or "not ranked",
        ]


def _tuning(result: Mapping[str, Any]) -> Iterator[list[str]]:
    for method in result["methods"]:
        for trial in method["trials"]:
            steps = max(map(int, trial["losses"]), default=0)
            chosen = "*" if is_chosen(trial, method) else ""
            fields = "".join(f", {path} {value}" for path, value in trial["fields"].items())
            yield [
                method["label"],
                f"{trial['rate']:g}{fields} {chosen}".strip(),
                f"{steps} steps" if steps else "-",
                trial["failed"] or (f"{trial['losses'][str(steps)]:.4f}" if steps else "-"),
                "" if trial["quality"] is None else f"{100 * trial['quality']:.1f} %",
            ]


def _runs(result: Mapping[str, Any]) -> Iterator[list[str]]:
    yield ["base", "-", f"{_points(result['base']['score'])} %", f"{result['base']['loss']:.4f}", "-"]
    for method in result["methods"]:
        for run in method["runs"]:
            score = f"{_points(run['score'])} %"
            yield [method["label"], str(run["seed"]), score, f"{run['loss']:.4f}", f"`{run['run']}`"]


def protocol_lines(result: Mapping[str, Any], command: str) -> Iterator[str]:
    """How the study was made, a line of a list each."""
    protocol, rows = result["protocol"], result["rows"]
    drawn = f" (drawn: {', '.join(rows['drawn'])})" if rows["drawn"] else ""
    counts = ", ".join(f"{rows[name]:,} {use}" for name, use in USES.items() if rows[name] is not None)
    yield f"- Model: {protocol['model']}; recipe: `{protocol['recipe']}`; {result['steps']} steps a run."
    yield f"- Rows: {counts}{drawn}; {rows['compared']:,} compared."
    yield (
        f"- {protocol['trials']} learning rates for each method, half a power of ten apart, halved by held-out loss "
        f"within the method; the chosen one by {result['metric']} on the validation rows, then the loss; seeds "
        f"{', '.join(map(str, result['seeds']))}, which share the order of the rows."
    )
    for number, one in enumerate(protocol["environments"]):
        versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        agreed = ", where the base and the first steps of LoRA came out as before" if number else ""
        yield f"- Computed from {one['since']} on {one['device']}{agreed}: {versions}."
    yield f"- {_time(result)}"
    yield f"- Again: `{command}`"


def _time(result: Mapping[str, Any]) -> str:
    """How long it took, and how much of that its runs computed; more than that on several devices."""
    time = result["time"]
    computed = time_text(time["training"] + time["answering"])
    return f"The study took {time_text(time['study'])}; training and answering, {computed}."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _points(share: float) -> str:
    return f"{100 * share:.1f}"
