"""A study's results as text: one table and the verdict for a terminal, and ``compare.md`` with all of it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ftune.artifacts.report import table, task_score, task_table
from ftune.experiments.document import Table
from ftune.experiments.rewind import rewind_lines
from ftune.experiments.serving import RULES
from ftune.experiments.study import BASE, REFERENCE
from ftune.human import bytes_text, time_text

__all__ = [
    "against",
    "best_first",
    "details",
    "differences_table",
    "export_lines",
    "forecast_text",
    "is_chosen",
    "markdown",
    "markdown_table",
    "overview",
    "paragraphs",
    "protocol_lines",
    "runs_table",
    "shown",
    "summary",
    "tasks_table",
    "tuning_table",
    "vitals_lines",
]


EFFECTS = {"better": "better", "hardly_moved": "hardly better", "worse": "worse"}
"""Of a run: its model by held-out loss, against the model before training (``ftune.artifacts.effect``)."""
USES = {"train": "to train on", "validation": "to choose by", "test": "for the report alone"}


def summary(result: Mapping[str, Any], root: str, width: int) -> str:
    """What a terminal shows at the end of a study."""
    head, rows = overview(result)
    if max(map(len, table(head, rows).splitlines())) > width:
        head, rows = head[:4], [row[:4] for row in rows]
    lines = [table(head, rows, right=range(1, len(head))), ""]
    if (tasks := tasks_table(result))[1]:
        shown_tasks = table(*tasks, right=range(3, len(tasks[0])))
        lines += [shown_tasks, ""] if max(map(len, shown_tasks.splitlines())) <= width else []
    lines += [textwrap.fill(text, width) for text in paragraphs(result)]
    lines += _time(result)
    return "\n".join([*lines, f"written: {root}/compare.html, compare.md, compare.json"])


def markdown(result: Mapping[str, Any], command: str) -> str:
    """``compare.md``: verdict, table, differences, tuning, runs, protocol."""
    parts = ["# Comparison of methods", "", *(f"{text}\n" for text in paragraphs(result))]
    parts += [*markdown_table(overview(result)), "", "## Details", "", *markdown_table(details(result)), ""]
    parts += [f"- {line}" for line in (*export_lines(result), *vitals_lines(result))]
    parts += ["", "## Against LoRA", ""]
    parts += ["Paired by test row, 95 % intervals, in points; p by Holm over all methods (docs/statistics.md).\n"]
    parts += markdown_table(differences_table(result))
    if (tasks := tasks_table(result))[1]:
        parts += ["", "## Tasks of lm-evaluation-harness", "", "One run of each method; differences paired by item.\n"]
        parts += markdown_table(tasks)
    parts += ["", "## Tuning: held-out loss by learning rate", ""]
    parts += ["The same number of rates for each method, around its own prior; `*` is the chosen one.\n"]
    parts += markdown_table(tuning_table(result))
    if lines := list(rewind_lines(result)):
        parts += ["", "## Rewind: where each method forgets least within the margin of its best quality", ""]
        parts += ["On validation rows and neutral text; the seed that was tuned.\n", *(f"- {line}" for line in lines)]
    parts += ["", "## Runs", ""]
    parts += markdown_table(runs_table(result))
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
    if forecast.tasks:
        texts.append(f"besides: {', '.join(forecast.tasks)} on the base and on one run of each method")
    if forecast.cut_from is not None:
        texts.append(
            f"so that it fits the budget, a run makes {settled.steps} of the recipe's {forecast.cut_from} steps"
        )
    head = table(("method", "s/step", "peak", "rate around"), rows, right=(1, 2, 3))
    return "\n".join([head, "", *(textwrap.fill(text, width) for text in texts)])


def paragraphs(result: Mapping[str, Any]) -> list[str]:
    """The verdict and what else must be known, a paragraph each."""
    verdict = result["verdict"]
    said = ["No verdict: LoRA could not be trained." if verdict is None else str(verdict["sentence"])]
    for method in result["methods"]:
        said += [f"`{method['label']}` failed: {why}" for why in method["failures"]]
        if again := method.get("again"):
            said.append(
                f"`{method['label']}`: tasks and rewinding, as far as they were asked for later, were measured on "
                f"{again['run']}: the run was trained again, for the weights that were tested are gone. Its held-out "
                f"loss was {again['then']:.4f} and is {again['now']:.4f}."
            )
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
    if why := result.get("tasks_failed"):
        said.append(f"The tasks failed on the model before training: {why}")
    return said


def overview(result: Mapping[str, Any]) -> Table:
    """What decides: the methods, best first, with the base."""
    verdict = result["verdict"] or {"ties": [], "comparisons": {}}
    groups, compared = verdict["ties"], verdict["comparisons"]
    base = result["base"]["score"]
    tasks = _task_columns(result)
    of_base = [task_score(row, "base") for row in tasks]
    base_row = [BASE, _points(base), against(compared.get(BASE)), _letters(BASE, groups), *["-"] * 4, *of_base]
    rows = [(base, base_row)]
    for method in result["methods"]:
        label, score, costs = method["label"], method["score"], method["costs"]
        mark = "failed" if score is None else "not tuned" if method["at_edge"] else _letters(label, groups)
        rows.append(
            (
                -1.0 if score is None else score,
                [
                    label,
                    shown(score, _points),
                    against(compared.get(label)),
                    mark,
                    shown(costs["memory"], bytes_text),
                    shown(costs["time"], time_text),
                    shown(costs["size"], bytes_text),
                    "-" if method["forgetting"] is None else f"{method['forgetting']['loss'][0]:+.3f}",
                    *(_task_cell(method, row) for row in tasks),
                ],
            )
        )
    head = ["method", f"{result['metric']} %", "against LoRA", "ties", "memory", "time", "size", "forgets"]
    head += [row["task"] for row in tasks]
    return head, [row for _, row in sorted(rows, key=lambda row: (-row[0], row[1][0]))]


def details(result: Mapping[str, Any]) -> Table:
    """The rest of each method: seeds, rate, what it trains, and what becomes of it."""
    rows = []
    for method in result["methods"]:
        scores = [run["score"] for run in method["runs"] if "score" in run]
        exports = method.get("exports", {})
        engines = exports.get("served", {})
        rows.append(
            [
                method["label"],
                f"{_points(min(scores))} to {_points(max(scores))}" if len(scores) > 1 else "-",
                shown(method["rate"], "{:g}".format),
                shown(method.get("parameters"), "{:,}".format),
                shown(method.get("tokens_per_second"), "{:,.0f}".format),
                _exported(exports.get("merge")),
                _exported(exports.get("load")),
                engines.get("vllm", "-"),
                engines.get("llama.cpp", "-"),
            ]
        )
    head = ("method", "seeds", "rate", "trained", "tokens/s", "merges", "loads", "vLLM", "llama.cpp")
    return head, rows


def export_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What the table of details means, and why something does not merge or load."""
    yield (
        "merges, loads: the largest difference of a logit from the tuned model, in fp32, of the first run of each "
        "method: merged as by `ftune merge`, or loaded by plain PEFT or transformers. Up to 0.001 is rounding."
    )
    yield RULES
    for method in result["methods"]:
        for name, what in (("merge", "cannot be merged"), ("load", "cannot be loaded without ftune")):
            found = method.get("exports", {}).get(name) or {}
            if found.get("why"):
                unsure = found["error"] is not None or found["why"].startswith("not checked")
                yield (
                    f"`{method['label']}`, {name}: {found['why']}"
                    if unsure
                    else f"`{method['label']}` {what}: {found['why']}"
                )


def vitals_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What each method's first run says of itself."""
    for method in result["methods"]:
        for run in method["runs"][:1]:
            if run.get("vitals"):
                advice = "".join(f"; {line}" for line in run["advice"])
                yield f"`{method['label']}`: {run['vitals']} ({_to_run(run['run'])}){advice}"


def _exported(found: Mapping[str, Any] | None) -> str:
    if not found or (found["error"] is None and found["why"].startswith("not checked")):
        return "-"
    return "no" if found["why"] else f"{found['error']:.1g}"


def against(one: Mapping[str, Any] | None) -> str:
    """A difference in points, with its interval."""
    if one is None:
        return "-"
    # 0.0 is added since a minus before a rounded zero says nothing
    d, lo, hi = (round(100 * one["difference"][end], 1) + 0.0 for end in ("d", "lo", "hi"))
    return f"{d:+.1f} [{lo:+.1f}, {hi:+.1f}]"


def shown(value: Any, text: Callable[[Any], str]) -> str:
    """A value as text; ``-`` where there is none."""
    return "-" if value is None else text(value)


def _task_columns(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of each task the first score, as the first method that was measured on it has it."""
    rows: list[dict[str, Any]] = next((method["tasks"] for method in result["methods"] if method.get("tasks")), [])
    return list({row["task"]: row for row in reversed(rows) if row["shown"]}.values())[::-1]


def _task_cell(method: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    wanted = (column["task"], column["metric"])
    return next(
        (task_score(row, "tuned") for row in method.get("tasks", ()) if (row["task"], row["metric"]) == wanted), "-"
    )


def tasks_table(result: Mapping[str, Any]) -> Table:
    """Every method's scores on tasks beside the base's."""
    head: Sequence[str] = ()
    rows: list[list[str]] = []
    for method in result["methods"]:
        if asked := [row for row in method.get("tasks", ()) if row["shown"]]:
            head, of_method = task_table(asked)
            rows += [[method["label"], *row] for row in of_method]
    return ("method", *head), rows


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
            rate = f"{trial['rate']:g}"
            if steps:
                rate = f"[{rate}]({trial['run']}/run.json)"
            chosen = "*" if is_chosen(trial, method) else ""
            fields = "".join(f", {path} {value}" for path, value in trial["fields"].items())
            yield [
                method["label"],
                f"{rate}{fields} {chosen}".strip(),
                f"{steps} steps" if steps else "-",
                trial["failed"] or (f"{trial['losses'][str(steps)]:.4f}" if steps else "-"),
                "" if trial["quality"] is None else f"{100 * trial['quality']:.1f} %",
            ]


def runs_table(result: Mapping[str, Any]) -> Table:
    """Every run that is reported, with links to it and to its answers."""
    return ("method", "seed", f"{result['metric']} %", "loss", "model is", "run", "answers"), list(_runs(result))


def _runs(result: Mapping[str, Any]) -> Iterator[list[str]]:
    base, answers = result["base"], f"[answers](tests/{BASE}/predictions.jsonl)"
    yield [BASE, "-", _points(base["score"]), f"{base['loss']:.4f}", "-", "-", answers]
    for method in result["methods"]:
        for run in method["runs"]:
            answers = f"[answers]({run['run'].replace('runs/', 'tests/', 1)}/predictions.jsonl)"
            effect = EFFECTS.get(run.get("effect", ""), "-")
            to = _to_run(run["run"])
            yield [method["label"], str(run["seed"]), _points(run["score"]), f"{run['loss']:.4f}", effect, to, answers]


def _to_run(run: str) -> str:
    return f"[{run}]({run}/run.json)"


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
    yield from (f"- {text}" for text in _time(result))
    yield f"- Again: `{command}`"


def _time(result: Mapping[str, Any]) -> Iterator[str]:
    """How long it took, if known, and how much of that its runs computed; more than that on several devices."""
    time = result["time"]
    if not time["study"]:
        return
    computed = time_text(time["training"] + time["answering"])
    yield f"The study took {time_text(time['study'])}; training and answering, {computed}."


def markdown_table(made: Table) -> list[str]:
    """A table as lines of Markdown."""
    head, rows = made
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _points(share: float) -> str:
    return f"{100 * share:.1f}"
