"""A study's results as one HTML page that needs no network: verdict, table, pictures, items won and lost, protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftune.experiments import figures
from ftune.experiments.document import (
    Table,
    bullets,
    document,
    figure,
    filtered,
    marked,
    pictures,
    section,
    table,
    text,
)
from ftune.experiments.items import items_part
from ftune.experiments.markdown import (
    details,
    differences_table,
    export_lines,
    overview,
    paragraphs,
    protocol_lines,
    runs_table,
    tasks_table,
    tuning_table,
    vitals_lines,
)
from ftune.experiments.rewind import rewind_lines, rewind_table
from ftune.experiments.study import BASE, REFERENCE
from ftune.experiments.trials import item_texts

__all__ = ["page"]


def page(result: Mapping[str, Any], root: Path, command: str) -> str:
    """The page; the same study gives the same bytes.

    Args:
        result: What ``compare.json`` holds.
        root: The study's directory, for the texts of its test rows.
        command: What made it.
    """
    title = f"{Path(result['protocol']['recipe']).stem}: methods compared"
    first, *others = map(marked, paragraphs(result))
    parts = [f"<h1>{text(title)}</h1>", f"<p class=verdict>{first}</p>", *(f"<p>{said}</p>" for said in others)]
    parts += section("Methods", filtered("methods", _to_runs(overview(result), result)), _NOTE)
    if result["verdict"] is not None:
        caption = "Differences from LoRA, in points, with 95 % intervals; the grey band is the margin"
        numbers = table("differences", _to_runs(differences_table(result), result))
        parts += section("Against LoRA", figure(figures.differences(result), caption, numbers))
    explained = bullets([*export_lines(result), *vitals_lines(result)])
    parts += section("Details", table("details", _to_runs(details(result), result)), explained)
    if (tasks := tasks_table(result))[1]:
        parts += section("Tasks of lm-evaluation-harness", table("tasks", tasks))
    caption = "Held-out loss by learning rate: filled where trained to the end, large where chosen"
    parts += section("Tuning", pictures(figures.rates(result), caption, table("tuning", tuning_table(result))))
    drawn = [
        figure(svg, f"Quality against {name}; bars: the range over seeds; dashed: before training")
        for cost, (name, _) in figures.COSTS.items()
        if (svg := figures.against_cost(result, cost)) is not None
    ]
    parts += section("Quality and cost", f'<div class="grid">{"".join(drawn)}</div>')
    if rewound := figures.rewound(result):
        caption = (
            "Quality on the validation rows against forgetting: thin along the run, thick along the scale of its end; "
            "large: the least forgetting within the margin of the best quality"
        )
        shown = pictures(rewound, caption, table("rewind", rewind_table(result)))
        parts += section("Rewind", shown, bullets(list(rewind_lines(result))))
    caption = "Held-out loss by step; thick: the chosen setting"
    parts += section("Loss", pictures(figures.losses(result), caption))
    parts += section("Runs", table("runs", runs_table(result), anchor="run-"))
    others = [method["label"] for method in result["methods"] if method["runs"] and method["label"] != REFERENCE]
    parts += section("Test rows", *items_part(item_texts(result, root), REFERENCE, "LoRA", others))
    parts += section("Protocol", bullets([line.removeprefix("- ") for line in protocol_lines(result, command)]))
    return document(title, parts)


_NOTE = (
    "<p class=note>Methods that share a letter under <em>ties</em> are not told apart. Memory and time: a few steps of "
    "every method in turns, in processes of their own. A method's name leads to its runs.</p>"
)


def _to_runs(made: Table, result: Mapping[str, Any]) -> Table:
    """A table with links from the methods to their runs, if they have any."""
    head, rows = made
    ran = {BASE, *(method["label"] for method in result["methods"] if method["runs"])}
    return head, [[f"[{row[0]}](#run-{row[0]})" if row[0] in ran else row[0], *row[1:]] for row in rows]
