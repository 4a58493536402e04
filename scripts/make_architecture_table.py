"""Write docs/architectures.md by trying it: methods on tiny random models of every architecture of the tests.

    python scripts/make_architecture_table.py          # ten minutes on two cores

Every cell goes from the plan through training, evaluation and the merge, which is read back by transformers alone
(`tests/causal_models.py`). What ends so works; what the plan refuses is refused. Anything else is printed, and the page
stays as it was.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architectures.md"
METHODS = ("lora", "dora", "qlora", "galore", "longlora", "full")

HEAD = """\
# Architectures

Made by `scripts/make_architecture_table.py` with transformers {transformers}, peft {peft} and torch {torch}, on tiny
random models, three updates each. A cell that works was planned, trained, saved, read back with the same loss, and
merged with the same logits; the merged directory was read by transformers alone, with no weight missing or left over. A
number is a refusal by the plan, before weights are loaded, for the reason below.

- `attention`: what `auto` chooses.
- `shared rows`: whether `packing: auto` lets documents share a row. Where an architecture mixes them (recurrent layers,
  positions that it counts itself) each gets a row of its own.
- Of models that see images the language model alone is adapted; what is saved and merged is the complete model.

"""


Row = tuple[str, str, str, bool, dict[str, tuple[str, str]]]
"""Name, model type, attention, whether documents share rows, and for each method the verdict and its words."""


def try_all() -> Iterator[Row]:
    """Try every method on every architecture."""
    sys.path.insert(0, str(ROOT / "tests"))
    import causal_models

    from ftune.plan.resolve import resolve

    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate([*causal_models.CONFIGS, *causal_models.VISION]):
            base = causal_models.make(name, Path(scratch) / f"model-{number}")
            recipe = resolve(causal_models.recipe(base, "full", Path(scratch) / f"plan-{number}").recipe).recipe
            cells = {
                method: causal_models.outcome(base, method, Path(scratch) / f"{method}-{number}") for method in METHODS
            }
            kind = json.loads((base / "config.json").read_text())["model_type"]
            yield name, kind, recipe.model.attention, bool(recipe.data.packing), cells


def render(rows: Iterable[Row]) -> str:
    """The page."""
    reasons: list[str] = []
    lines = [
        "| architecture | attention | shared rows | " + " | ".join(f"`{method}`" for method in METHODS) + " |",
        "|---|---|---|" + "---|" * len(METHODS),
    ]
    for name, kind, attention, packing, cells in rows:
        texts = [attention, "yes" if packing else "no"]
        for verdict, words in cells.values():
            if verdict == "refused":
                reason = words.replace(kind, "the model")
                reasons += [] if reason in reasons else [reason]
                verdict = f"[{reasons.index(reason) + 1}](#refused)"
            texts.append(verdict)
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    versions = {package: version(package).partition("+")[0] for package in ("transformers", "peft", "torch")}
    listed = [f"{number}. {reason[0].upper()}{reason[1:]}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([HEAD.format(**versions) + "\n".join(lines), "", "## Refused", "", *listed, ""])


def main() -> int:
    """Write the page, unless a cell fails."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rows = []
    for row in try_all():
        rows.append(row)
        print(row[0], *(verdict for verdict, _ in row[4].values()), flush=True)
    failed = [f"{row[0]}, {method}: {words}" for row in rows for method, (ok, words) in row[4].items() if ok == "fails"]
    print(*failed, sep="\n", file=sys.stderr)
    if not failed:
        PAGE.write_text(render(rows))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
