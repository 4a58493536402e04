"""Parts of a page that needs no network: sections, tables that sort, pictures with their numbers, links to runs."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from urllib.parse import quote

__all__ = [
    "Table",
    "bullets",
    "document",
    "figure",
    "filtered",
    "link",
    "marked",
    "pictures",
    "section",
    "table",
    "text",
]

Table = tuple[Sequence[str], list[list[str]]]
"""Head and rows. A cell may have `code` and [links](path), in Markdown and on a page alike."""

_LINK = re.compile(r"\[([^\[\]]+)\]\((#?[\w.][\w./%+=~-]*)\)")
"""A link to a file beside the page, or to a place on it: no scheme, no host, nothing that runs."""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page."""
    template = (resources.files("ftune.experiments") / "page.html").read_text(encoding="utf-8")
    return template.replace("{title}", text(title)).replace("{body}", "\n".join(parts))


def link(shown: str, target: Path, root: Path) -> str:
    """A link to a file from a page in the directory ``root``."""
    return f"[{shown}]({quote(os.path.relpath(target, root))})"


def section(title: str, *parts: str) -> list[str]:
    """A part of the page with a heading."""
    return [f"<section><h2>{text(title)}</h2>", *parts, "</section>"]


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{marked(line)}</li>' for line in lines)}</ul>"


def pictures(drawn: Sequence[str], caption: str, numbers: str = "") -> str:
    """Small pictures side by side with one caption."""
    return figure(f'<div class="grid">{"".join(drawn)}</div>', caption, numbers)


def figure(svg: str, caption: str, numbers: str = "") -> str:
    """A picture with its caption, which is also what a screen reader says of it, and its numbers."""
    inner = f"<details><summary>The numbers</summary>{numbers}</details>" if numbers else ""
    return (
        f'<figure><div role="img" aria-label="{text(caption)}">{svg}</div>'
        f"<figcaption>{text(caption)}</figcaption></figure>{inner}"
    )


def filtered(name: str, made: Table) -> str:
    """A table with a field that filters its rows."""
    find = f'<p class=find><label>Filter <input type="search" data-table="{name}"></label></p>'
    return find + table(name, made)


def table(name: str, made: Table, anchor: str = "") -> str:
    """A table whose rows sort by a column.

    Args:
        name: Unique on the page.
        made: Head and rows.
        anchor: Before what the first cell says, the name of the first such row, for links to it; empty: no names.
    """
    head, rows = made
    cells = "".join(f'<th scope="col"><button type="button">{text(cell)}</button></th>' for cell in head)
    return (
        f'<div class=wide tabindex="0" role="region" aria-label="{text(name)}">'
        f'<table id="{name}"><thead><tr>{cells}</tr></thead><tbody>{"".join(_rows(rows, anchor))}</tbody></table></div>'
    )


def _rows(rows: Sequence[Sequence[str]], anchor: str) -> Iterator[str]:
    named: set[str] = set()
    for row in rows:
        first, *others = map(marked, row)
        own = f' id="{anchor}{text(row[0])}"' if anchor and row[0] not in named else ""
        named.add(row[0])
        yield f'<tr{own}><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"


def text(plain: str) -> str:
    """Text as HTML."""
    return html.escape(str(plain))


def marked(plain: str) -> str:
    """Text with `code` and [links](path) as such."""
    parts = text(plain).split("`")
    return "".join(f"<code>{p}</code>" if i % 2 else _LINK.sub(r'<a href="\2">\1</a>', p) for i, p in enumerate(parts))
