"""All studies below a directory, a table each, gathered by model and data; none is ranked against another."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftune.artifacts.report import table as text_table
from ftune.errors import RunDirError
from ftune.experiments.document import bullets, document, link, marked, section, table, text
from ftune.experiments.markdown import overview, paragraphs

__all__ = ["leaderboard", "leaderboard_page", "leaderboard_text"]

NOTE = (
    "Only the rows of one table are comparable: another study has other test rows, another length, other versions or "
    "another machine. Methods that share a letter under ties are not told apart."
)


def leaderboard(directory: Path) -> dict[str, Any]:
    """Every ``compare.json`` below a directory.

    Returns:
        ``groups``, one for each model and data, each with its ``studies``, the newest first; ``unreadable``, by path.

    Raises:
        RunDirError: There is none.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    unreadable: dict[str, str] = {}
    for path in sorted(directory.rglob("compare.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            study = _study(result, path.parent)
            overview(study)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            unreadable[str(path)] = f"{type(error).__name__}: {error}"
            continue
        groups.setdefault((study["model"], study["data"]), []).append(study)
    if not groups:
        wrong = "".join(f"\n  {path}: {why}" for path, why in unreadable.items())
        raise RunDirError(f"no study below {directory}: no compare.json that can be read{wrong}", help="ftune compare")
    for studies in groups.values():
        studies.sort(key=lambda study: (study["dates"], study["path"]), reverse=True)
    return {
        "version": 1,
        "groups": [{"model": model, "data": data, "studies": groups[model, data]} for model, data in sorted(groups)],
        "unreadable": unreadable,
        "note": NOTE,
    }


def _study(result: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """What a leaderboard keeps of a study: older ones may lack data, date and machine."""
    protocol = result["protocol"]
    environments = protocol.get("environments", [])
    kept = ("verdict", "metric", "margin", "steps", "seeds", "base", "left_out")
    methods = ("label", "method", "score", "costs", "forgetting", "at_edge", "failures", "rate")
    return {
        "path": str(root),
        "model": protocol["model"],
        "data": protocol.get("data") or f"the data of {protocol['recipe']}",
        "dates": [one["since"] for one in environments],
        "devices": list(dict.fromkeys(one["device"] for one in environments)),
        "rows": result["rows"]["compared"],
        "trials": protocol["trials"],
        **{name: result[name] for name in kept},
        "methods": [{name: method[name] for name in methods} for method in result["methods"]],
    }


def leaderboard_text(found: Mapping[str, Any], width: int) -> str:
    """Every study with its verdict and its table, wrapped to ``width``."""
    lines: list[str] = []
    for group in found["groups"]:
        lines += [f"{group['model']}, {group['data']}", ""]
        for study in group["studies"]:
            lines += [f"  {study['path']}"]
            lines += [_wrapped(said, width) for said in (*paragraphs(study), _made(study))]
            lines += ["", textwrap.indent(_fitting(study, width - 4), "    "), ""]
    lines += [_wrapped(f"{path} cannot be read: {why}", width) for path, why in found["unreadable"].items()]
    return "\n".join([*lines, textwrap.fill(NOTE, width)])


def _fitting(study: Mapping[str, Any], width: int) -> str:
    head, rows = overview(study)
    made = text_table(head, rows, right=range(1, len(head)))
    if max(map(len, made.splitlines())) <= width:
        return made
    return text_table(head[:4], [row[:4] for row in rows], right=(1, 2, 3))


def _wrapped(said: str, width: int) -> str:
    return textwrap.fill(said, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)


def _made(study: Mapping[str, Any]) -> str:
    """How much stands behind a study, in a line."""
    when = f", {' and '.join(study['dates'])}" if study["dates"] else ""
    where = f", on {', '.join(study['devices'])}" if study["devices"] else ""
    seeds = len(study["seeds"])
    return (
        f"{study['rows']:,} test rows, {seeds} seed{'s' * (seeds != 1)}, {study['trials']} rates a method, "
        f"{study['steps']:,} steps a run, margin {100 * study['margin']:g} points{where}{when}"
    )


def leaderboard_page(found: Mapping[str, Any], out: Path) -> str:
    """The page, for the directory ``out``; the same studies give the same bytes."""
    parts = ["<h1>Studies</h1>", f"<p>{text(NOTE)}</p>", *_unreadable(found)]
    number = 0
    for group in found["groups"]:
        inner = []
        for study in group["studies"]:
            number += 1
            root = Path(study["path"])
            report = next(root / name for name in ("compare.html", "compare.json") if (root / name).is_file())
            first, *others = map(marked, paragraphs(study))
            inner += [
                f"<h3>{marked(link(root.name, report, out))}</h3><p class=verdict>{first}</p>",
                *(f"<p>{said}</p>" for said in others),
                f"<p class=note>{text(_made(study))}</p>",
                table(f"study-{number}", overview(study)),
            ]
        parts += section(f"{group['model']}, {group['data']}", *inner)
    return document("Studies", parts)


def _unreadable(found: Mapping[str, Any]) -> Iterator[str]:
    if found["unreadable"]:
        yield bullets([f"`{path}` cannot be read: {why}" for path, why in found["unreadable"].items()])
