"""Make docs/studies/data/math-{train,validation,test}.jsonl: short exercises with exact answers.

Usage::

    pip install mathematics-dataset==1.0.1 sympy==1.5.1
    python scripts/make_exercises.py

By DeepMind's mathematics_dataset (Apache-2.0; Saxton et al., arXiv:1904.01557), six kinds at their easiest third, in
turns. The output is a function of the seed alone; no question is made twice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SEED = 18
KINDS = (
    "comparison__kth_biggest",
    "comparison__sort",
    "measurement__time",
    "numbers__place_value",
    "numbers__round_number",
    "arithmetic__add_or_sub",
)
LONGEST = 90
"""Characters of a question, at most."""
SIZES = {"train": 480, "validation": 120, "test": 600}


def named(modules: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Callable[[], Any]]]:
    """The generators of exercises by their names."""
    for name, module in modules.items():
        if isinstance(module, dict):
            yield from named(module, f"{prefix}{name}__")
        else:
            yield prefix + name, module


def main() -> None:
    """Write the files."""
    import numpy as np
    from mathematics_dataset.modules import modules

    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the generators draw from it
    makers = dict(named(modules.train(lambda entropy: (entropy[0], entropy[0] + (entropy[1] - entropy[0]) / 3))))
    seen: set[str] = set()
    rows = []
    while len(rows) < sum(SIZES.values()):
        for kind in KINDS:
            while True:
                made = makers[kind]()
                question = str(made.question)
                if len(question) <= LONGEST and question not in seen:
                    break
            seen.add(question)
            rows.append({"prompt": question, "completion": str(made.answer)})
    out = Path(__file__).parent.parent / "docs/studies/data"
    out.mkdir(parents=True, exist_ok=True)
    for name, size in SIZES.items():
        part, rows = rows[:size], rows[size:]
        text = "".join(f"{json.dumps(row)}\n" for row in part)
        (out / f"math-{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
