"""A study's results as one HTML page that needs no network: verdict, table, pictures, items won and lost, protocol."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ftune.experiments import figures
from ftune.experiments.markdown import differences_table, overview, paragraphs, protocol_lines, tuning_table
from ftune.experiments.study import BASE, REFERENCE
from ftune.experiments.trials import item_texts

__all__ = ["page"]

MOST_ITEMS = 300
"""Items that are shown; those on which methods differ come first."""
LONGEST = 600
"""Characters of an item's text that are shown."""


def page(result: Mapping[str, Any], root: Path, command: str) -> str:
    """The page; the same study gives the same bytes.

    Args:
        result: What ``compare.json`` holds.
        root: The study's directory, for the texts of its test rows.
        command: What made it.
    """
    title = f"{Path(result['protocol']['recipe']).stem}: methods compared"
    first, *others = map(_marked, paragraphs(result))
    parts = [f"<h1>{_text(title)}</h1>", f"<p class=verdict>{first}</p>", *(f"<p>{text}</p>" for text in others)]
    parts += _section("Methods", _filter("methods"), _table("methods", *overview(result)), _NOTE)
    if result["verdict"] is not None:
        caption = "Differences from LoRA, in points, with 95 % intervals; the grey band is the margin"
        numbers = _table("differences", *differences_table(result))
        parts += _section("Against LoRA", _figure(figures.differences(result), caption, numbers))
    caption = "Held-out loss by learning rate: filled where trained to the end, large where chosen"
    parts += _section("Tuning", _grid(figures.rates(result), caption, _table("tuning", *tuning_table(result))))
    pictures = [
        _figure(svg, f"Quality against {name}; bars: the range over seeds; dashed: before training")
        for cost, (name, _) in figures.COSTS.items()
        if (svg := figures.against_cost(result, cost)) is not None
    ]
    parts += _section("Quality and cost", f'<div class="grid">{"".join(pictures)}</div>')
    caption = "Held-out loss by step; thick: the chosen setting"
    parts += _section("Loss", _grid(figures.losses(result), caption))
    parts += _section("Test rows", *_items(result, root))
    lines = "".join(f"<li>{_marked(line.removeprefix('- '))}</li>" for line in protocol_lines(result, command))
    parts += _section("Protocol", f"<ul>{lines}</ul>")
    template = (resources.files("ftune.experiments") / "page.html").read_text(encoding="utf-8")
    return template.replace("{title}", _text(title)).replace("{body}", "\n".join(parts))


_NOTE = (
    "<p class=note>Methods that share a letter under <em>ties</em> are not told apart. Memory and time: a few steps of "
    "every method in turns, in processes of their own.</p>"
)


def _section(title: str, *parts: str) -> list[str]:
    return [f"<section><h2>{_text(title)}</h2>", *parts, "</section>"]


def _grid(pictures: Sequence[str], caption: str, table: str = "") -> str:
    return _figure(f'<div class="grid">{"".join(pictures)}</div>', caption, table)


def _figure(svg: str, caption: str, table: str = "") -> str:
    inner = f"<details><summary>The numbers</summary>{table}</details>" if table else ""
    return (
        f'<figure><div role="img" aria-label="{_text(caption)}">{svg}</div>'
        f"<figcaption>{_text(caption)}</figcaption></figure>{inner}"
    )


def _filter(name: str) -> str:
    return f'<p class=find><label>Filter <input type="search" data-table="{name}"></label></p>'


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col"><button type="button">{_text(cell)}</button></th>' for cell in head)
    body = "".join(f"<tr>{_row(row)}</tr>" for row in rows)
    return (
        f'<div class=wide tabindex="0" role="region" aria-label="{_text(name)}">'
        f'<table id="{name}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _row(cells: Sequence[str]) -> str:
    first, *others = map(_marked, cells)
    return f'<th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others)


def _items(result: Mapping[str, Any], root: Path) -> Iterator[str]:
    """Test rows with every method's first answer, those first on which the methods differ most."""
    items = item_texts(result, root)
    shown = sorted(items, key=lambda item: (-_spread(item), item["row"]))[:MOST_ITEMS]
    if len(items) > len(shown):
        yield f"<p class=note>{len(shown)} of {len(items)} rows: those on which the methods differ most.</p>"
    others = [method["label"] for method in result["methods"] if method["runs"] and method["label"] != REFERENCE]
    options = "".join(f"<option>{_text(name)} {kind}</option>" for name in others for kind in ("won", "lost"))
    yield (
        '<p class=find><label>Search <input type="search" data-items></label> <label>Against LoRA '
        f'<select data-won><option value="">all</option>{options}</select></label> '
        '<span role="status" data-count></span></p>'
    )
    yield from (_item(item) for item in shown)


def _item(item: Mapping[str, Any]) -> str:
    answers = item["answers"]
    marks = [
        f"{name} {'won' if score > answers[REFERENCE][1] else 'lost'}"
        for name, (_, score) in answers.items()
        if name != BASE and REFERENCE in answers and score != answers[REFERENCE][1]
    ]
    given = "".join(
        f"<dt>{_text(name)} <span class=score>{100 * score:.0f}</span></dt><dd>{_text(_short(answer))}</dd>"
        for name, (answer, score) in answers.items()
    )
    return (
        f'<details class=item data-marks="{_text(json.dumps(marks))}"><summary>row {item["row"]}: '
        f"{_text(item['prompt'][-120:])}</summary><pre>{_text(_short(item['prompt']))}</pre>"
        f"<dl><dt>right</dt><dd>{_text(_short(item['reference']))}</dd>{given}</dl></details>"
    )


def _spread(item: Mapping[str, Any]) -> float:
    scores: list[float] = [score for _, score in item["answers"].values()]
    return max(scores) - min(scores)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _text(text: str) -> str:
    return html.escape(str(text))


def _marked(text: str) -> str:
    """Text with `code` as such."""
    parts = _text(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
