"""One or several runs side by side: what differs, losses, scores with intervals, costs. Not a tuned comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ftune.artifacts.paired import Difference, difference
from ftune.artifacts.run_dir import RunDir
from ftune.errors import RunDirError
from ftune.experiments import figures
from ftune.experiments.answers import Answered, interval, read_answers
from ftune.experiments.document import (
    Table,
    bullets,
    document,
    figure,
    filtered,
    link,
    marked,
    pictures,
    section,
    table,
    text,
)
from ftune.experiments.items import items_part
from ftune.experiments.markdown import EFFECTS, against, markdown_table, shown
from ftune.experiments.ties import holm
from ftune.human import bytes_text, time_text
from ftune.run.files import write_json, write_text
from ftune.run.sinks.jsonl import read_events
from ftune.run.sinks.tracker import flatten

__all__ = ["collect_runs", "report_markdown", "report_page", "write_report"]

POINTS = 200
"""Points of a curve; where there are more steps, each is the mean of several."""
CAUTION = (
    "These runs were not tuned alike: a difference may come from the learning rate, the length or the data, and not "
    "from the method, and another seed may turn it. `ftune compare` tunes every method alike."
)


def write_report(roots: Sequence[Path], out: Path, command: str) -> dict[str, Any]:
    """Write ``report.json``, ``report.md`` and ``report.html`` into a directory; returns what the first holds.

    Args:
        roots: Run directories; the others are compared with the first that has scores.
        out: The directory.
        command: What made it.

    Raises:
        RunDirError: One is no run directory, or is given twice.
        FtuneError: A package that a report needs is not installed.
    """
    result, items = collect_runs(roots)
    page = report_page(result, items, out, command)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", result)
    write_text(out / "report.md", report_markdown(result, out, command))
    write_text(out / "report.html", page)
    return result


def collect_runs(roots: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the runs have recorded, and the answers to the rows that all of them were measured on.

    Returns:
        What ``report.json`` holds: shares are of 1, times in seconds, sizes in bytes. And items (``items.items_part``).

    Raises:
        RunDirError: One is no run directory, or is given twice.
    """
    if len({root.resolve() for root in roots}) < len(roots):
        raise RunDirError("a run is given twice", help="name each run once")
    names = [root.resolve().name for root in roots]
    labels = names if len(set(names)) == len(names) else list(map(str, roots))
    runs = [_run(RunDir(root), label) for root, label in zip(roots, labels, strict=True)]
    answers = [_answers(root, run) for root, run in zip(roots, runs, strict=True)]
    for run, found in zip(runs, answers, strict=True):
        for name in run["metrics"]:
            run["intervals"][name] = _interval(found, name, run["metrics"][name])
    settings = [flatten(RunDir(root).read()["resolved"]) for root in roots]
    fields = sorted(set().union(*settings) - {"output_dir"})
    values = {field: [known.get(field) for known in settings] for field in fields}
    differs = {field: of_runs for field, of_runs in values.items() if any(one != of_runs[0] for one in of_runs)}
    differences: list[dict[str, Any]] = []
    not_compared: dict[str, str] = {}
    first = next((number for number, found in enumerate(answers) if found), 0)
    for number, (run, found) in enumerate(zip(runs, answers, strict=True)):
        if number == first:
            continue
        if why := _not_the_same_rows(answers[first], found):
            not_compared[run["label"]] = why
        else:
            differences += _differences(runs[first], run, answers[first], found)
    for metric in {one["metric"] for one in differences}:
        of_metric = {one["run"]: one for one in differences if one["metric"] == metric}
        for label, p in holm({label: one["difference"]["p"] for label, one in of_metric.items()}).items():
            of_metric[label]["adjusted_p"] = p
    result = {
        "version": 1,
        "runs": runs,
        "differs": differs,
        "against": runs[first]["label"],
        "differences": differences,
        "not_compared": not_compared,
        "caution": CAUTION if len(runs) > 1 else None,
    }
    return result, _items(runs, answers, not_compared, first)


def _run(run: RunDir, label: str) -> dict[str, Any]:
    """What a run recorded of itself, and of its evaluation."""
    run.require_plain()
    record = run.read()
    plan, measured = record["plan"], record.get("measured", {})
    events = read_events(run.metrics)
    artifact = run.root / plan["method"]["artifact"]
    evaluated = _evaluated(run)
    tuned = evaluated.get("tuned", {})
    return {
        "label": label,
        "path": str(run.root),
        "status": record.get("status", "unknown"),
        "method": plan["method"]["name"],
        "model": plan["model"]["public_name"],
        "seed": record.get("seed"),
        "rate": plan["training"]["learning_rate"],
        "steps": measured.get("steps"),
        "parameters": plan["method"]["trainable"],
        "loss": {name: measured.get(name) for name in ("first_loss", "loss", "base_loss", "held_out_loss")},
        "memory": measured.get("peak_bytes"),
        "time": measured.get("training_seconds"),
        "tokens_per_second": measured.get("tokens_per_second"),
        "size": sum(file.stat().st_size for file in artifact.rglob("*.safetensors")) or None,
        "effect": (record.get("effect") or {}).get("verdict", "unknown"),
        "advice": (record.get("effect") or {}).get("advice", []),
        "vitals": record.get("vitals_line", ""),
        "device": record.get("device", {}).get("name"),
        "began": record.get("started"),
        "ended": record.get("ended"),
        "versions": record.get("versions", {}),
        "rows": evaluated.get("rows"),
        "metrics": tuned.get("metrics", {}),
        "intervals": {},
        "forgetting": evaluated.get("forgetting"),
        "curves": {
            "train": _thinned([(e["step"], e.get("loss")) for e in events if e["event"] == "step"]),
            "held_out": [(e["step"], e.get("loss")) for e in events if e["event"] == "eval"],
        },
    }


def _evaluated(run: RunDir) -> dict[str, Any]:
    """``eval.json``; empty where the run was not evaluated."""
    try:
        found = json.loads(run.eval_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise RunDirError(f"{run.eval_path} cannot be read: {error}", help="`ftune eval` makes it again") from error
    return found if isinstance(found, dict) else {}


def _thinned(points: Sequence[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """At most ``POINTS`` of them, each the last step of several with their mean; None where one is not finite."""
    size = -(-len(points) // POINTS) or 1
    found: list[tuple[int, float | None]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        losses = [loss for _, loss in group if loss is not None]
        found.append((group[-1][0], sum(losses) / len(losses) if len(losses) == len(group) else None))
    return found


Answers = Mapping[int, Answered]
"""By the number of a row; empty where none were kept."""


def _answers(root: Path, run: Mapping[str, Any]) -> Answers:
    """The answers and scores that `ftune eval` kept; none where it was not called, or no metric was asked for."""
    kept = run["metrics"] and (root / "predictions.jsonl").is_file()
    return read_answers(root, "tuned") if kept else {}


def _interval(answers: Answers, metric: str, value: float) -> tuple[float, float] | None:
    """The 95 % interval of a mean over rows; None of a metric that is no such mean, and of fewer than two rows."""
    scores = [one.scores.get(metric, np.nan) for one in answers.values()]
    return interval(scores) if len(scores) > 1 and abs(float(np.mean(scores)) - value) < 1e-6 else None


def _not_the_same_rows(one: Answers, other: Answers) -> str | None:
    """Why two runs cannot be compared row by row, or None where they can."""
    if not one or not other:
        return "`ftune eval` kept no scores; call it, with metrics in the recipe"
    both = one.keys() & other.keys()
    if any((one[row].prompt, one[row].reference) != (other[row].prompt, other[row].reference) for row in both):
        return "other test rows, or other prompts"
    return None if len(both) > 1 else "fewer than two test rows in common"


def _differences(
    first: Mapping[str, Any], run: Mapping[str, Any], one: Answers, other: Answers
) -> Iterator[dict[str, Any]]:
    """A run less the one that all are compared with, by each metric that is a mean over rows in both."""
    rows = sorted(one.keys() & other.keys())
    for metric in run["metrics"]:
        if not run["intervals"].get(metric) or not first["intervals"].get(metric):
            continue
        found: Difference = difference(
            np.array([[other[row].scores[metric] - one[row].scores[metric] for row in rows]])
        )
        plain = {name: value for name, value in asdict(found).items() if name not in ("seeds", "spread")}
        yield {"run": run["label"], "metric": metric, "rows": len(rows), "difference": plain, "adjusted_p": found.p}


def _items(
    runs: Sequence[Mapping[str, Any]], answers: Sequence[Answers], not_compared: Mapping[str, str], first: int
) -> list[dict[str, Any]]:
    """The rows that one run and those comparable with it were measured on, with their answers, that run's first."""
    metric = next(iter(runs[first]["metrics"]), "")
    known = {run["label"]: found for run, found in zip(runs, answers, strict=True) if metric in run["metrics"]}
    own = runs[first]["label"]
    shown = [own, *(label for label in known if label != own and label not in not_compared)]
    return [
        {
            "row": row,
            "prompt": answer.prompt,
            "reference": answer.reference,
            "answers": {
                label: (known[label][row].answer, known[label][row].scores[metric])
                for label in shown
                if row in known[label]
            },
        }
        for row, answer in sorted(answers[first].items())
    ]


# --- as text -----------------------------------------------------------------------------------------------


def report_markdown(result: Mapping[str, Any], out: Path, command: str) -> str:
    """``report.md``, with links from the directory ``out``."""
    parts = [
        "# Runs",
        "",
        *(f"{said}\n" for said in statements(result)),
        *markdown_table(_linked(overview(result), result, out)),
        "",
    ]
    parts += ["## Costs", "", *markdown_table(_linked(costs(result), result, out)), ""]
    if result["differences"]:
        parts += [
            f"## Against {result['against']}",
            "",
            *markdown_table(_linked(differences_table(result), result, out)),
            "",
        ]
    if result["differs"]:
        parts += ["## Settings that differ", "", *markdown_table(settings(result)), ""]
    parts += ["## At work", "", *(f"- {line}" for line in run_lines(result, out)), ""]
    return "\n".join([*parts, f"Again: `{command}`", ""])


def report_page(result: Mapping[str, Any], items: Sequence[Mapping[str, Any]], out: Path, command: str) -> str:
    """The page, for the directory ``out``; the same runs give the same bytes."""
    runs = result["runs"]
    title = "Runs: " + ", ".join(run["label"] for run in runs)
    first, *others = map(marked, statements(result))
    parts = [f"<h1>{text(title)}</h1>", f"<p class=verdict>{first}</p>", *(f"<p>{said}</p>" for said in others)]
    parts += section("Quality", filtered("runs", _linked(overview(result), result, out)))
    if result["differences"]:
        caption = f"Differences from {result['against']}, in points, paired by row, with 95 % intervals"
        rows = [(_named(one), one["difference"], _sign(one) != "0") for one in result["differences"]]
        svg = figures.forest(rows, f"points more than {result['against']} (95 %)")
        parts += section(
            "Differences", figure(svg, caption, table("differences", _linked(differences_table(result), result, out)))
        )
    parts += section("Memory, time, size", table("costs", _linked(costs(result), result, out)))
    caption = "Loss by step; thin: training, the mean of several steps where there are many; thick: held-out"
    parts += section(
        "Loss", pictures(figures.curves(runs), caption, table("losses", _linked(_losses(result), result, out)))
    )
    if result["differs"]:
        parts += section("Settings that differ", table("settings", settings(result)))
    parts += section("At work", bullets(list(run_lines(result, out))))
    if items:
        compared = [label for label in items[0]["answers"] if label != result["against"]]
        parts += section("Test rows", *items_part(items, result["against"], result["against"], compared))
    return document(title, [*parts, *section("Made by", f"<p><code>{text(command)}</code></p>")])


def _linked(made: Table, result: Mapping[str, Any], out: Path) -> Table:
    """A table of runs with links to them, from the directory ``out``."""
    head, rows = made
    paths = {run["label"]: Path(run["path"], "run.json") for run in result["runs"]}
    return head, [[link(row[0], paths[row[0]], out), *row[1:]] for row in rows]


def statements(result: Mapping[str, Any]) -> list[str]:
    """What can be said of the runs, a paragraph each."""
    said = []
    for one in result["differences"]:
        relation = {"+": "higher", "-": "lower", "0": "not told apart"}[_sign(one)]
        said.append(f"`{one['run']}`, {one['metric']}: {against(one)} points against `{result['against']}`: {relation}")
    if said:
        rows = {one["run"]: one["rows"] for one in result["differences"]}
        if len({*rows.values()}) == 1:
            over = f"{result['differences'][0]['rows']:,}"
        else:
            over = ", ".join(f"{count:,} (`{run}`)" for run, count in rows.items())
        said = [f"{'; '.join(said)}. Paired over {over} test rows, 95 % intervals."]
    if len(result["runs"]) == 1:
        run = result["runs"][0]
        said.append(f"`{run['label']}`: {run['method']} on {run['model']}, {run['status']}; {_became(run)}.")
    for why in dict.fromkeys(result["not_compared"].values()):
        labels = [f"`{label}`" for label, one in result["not_compared"].items() if one == why]
        said.append(f"Not compared with `{result['against']}`: {', '.join(labels)}: {why}.")
    return [*said, *([result["caution"]] if result["caution"] else [])]


def _became(run: Mapping[str, Any]) -> str:
    loss = run["loss"]
    if loss["held_out_loss"] is None:
        return "no rows were held out"
    before = "" if loss["base_loss"] is None else f"{loss['base_loss']:.4f} to "
    return f"held-out loss {before}{loss['held_out_loss']:.4f}"


def _sign(one: Mapping[str, Any]) -> str:
    d = one["difference"]
    if one["adjusted_p"] >= 0.05 or d["lo"] <= 0 <= d["hi"]:
        return "0"
    return "+" if d["lo"] > 0 else "-"


def overview(result: Mapping[str, Any]) -> Table:
    """Quality: losses, metrics with their intervals, and what was forgotten."""
    metrics = list(dict.fromkeys(name for run in result["runs"] for name in run["metrics"]))
    forgets = any(run["forgetting"] for run in result["runs"])
    head = ["run", "method", "held-out loss", *(f"{name} %" for name in metrics), *(["forgets"] if forgets else [])]
    rows = []
    for run in result["runs"]:
        row = [run["label"], run["method"], shown(run["loss"]["held_out_loss"], "{:.4f}".format)]
        row += [_with_interval(run, name) for name in metrics]
        if forgets:
            row.append("-" if run["forgetting"] is None else f"{run['forgetting']['loss'][0]:+.3f}")
        rows.append(row)
    return head, rows


def _with_interval(run: Mapping[str, Any], name: str) -> str:
    if name not in run["metrics"]:
        return "-"
    ends = run["intervals"][name]
    return f"{100 * run['metrics'][name]:.1f}" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")


def costs(result: Mapping[str, Any]) -> Table:
    """What the runs took."""
    head = ("run", "memory", "time", "size", "trained", "tokens/s", "steps", "rate", "seed")
    rows = [
        [
            run["label"],
            shown(run["memory"], bytes_text),
            shown(run["time"], time_text),
            shown(run["size"], bytes_text),
            f"{run['parameters']:,}",
            shown(run["tokens_per_second"], "{:,.0f}".format),
            shown(run["steps"], str),
            f"{run['rate']:g}",
            shown(run["seed"], str),
        ]
        for run in result["runs"]
    ]
    return head, rows


def differences_table(result: Mapping[str, Any]) -> Table:
    """Paired differences from one of the runs, in points."""
    rows = [
        [
            one["run"],
            one["metric"],
            *(f"{100 * one['difference'][end]:+.1f}" for end in ("d", "lo", "hi")),
            f"{one['adjusted_p']:.3f}" if one["adjusted_p"] >= 0.001 else "< 0.001",
            f"{one['rows']:,}",
        ]
        for one in result["differences"]
    ]
    return ("run", "metric", "difference", "from", "to", "p", "rows"), rows


def settings(result: Mapping[str, Any]) -> Table:
    """The fields of the recipes in which the runs differ."""
    rows = [
        [
            name,
            *("-" if value is None else f"{value:g}" if isinstance(value, float) else str(value) for value in values),
        ]
        for name, values in result["differs"].items()
    ]
    return ("field", *(run["label"] for run in result["runs"])), rows


def _losses(result: Mapping[str, Any]) -> Table:
    rows = [
        [run["label"], *(shown(run["loss"][name], "{:.4f}".format) for name in run["loss"])] for run in result["runs"]
    ]
    return ("run", "first", "last", "held-out before", "held-out after"), rows


def run_lines(result: Mapping[str, Any], out: Path) -> Iterator[str]:
    """Where each run is, what it says of itself, and what it was made with."""
    for run in result["runs"]:
        line = f"{link(run['label'], Path(run['path'], 'run.json'), out)}: {run['status']}"
        if run["ended"]:
            line += f" {run['ended']} on {run['device']}"
        if run["effect"] in EFFECTS:
            line += f"; the model is {EFFECTS[run['effect']]} than before"
        yield f"{line}{'; ' if run['vitals'] else ''}{run['vitals']}. " + "; ".join(run["advice"])


def _named(one: Mapping[str, Any]) -> str:
    return f"{one['run']} {one['metric']}"
