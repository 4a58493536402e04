"""Print what a run improved, from the files it left: the end of `make quickstart`.

Usage::

    python scripts/quickstart_summary.py RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ftune.artifacts.report import evaluation_table


def main() -> None:
    run = Path(sys.argv[1])
    result = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    print(evaluation_table(result | {"samples": []}, 100))
    print()
    base, tuned = result["base"]["metrics"], result["tuned"]["metrics"]
    scores = ", ".join(
        f"{name.replace('_', ' ')} {100 * base[name]:.0f} % -> {100 * score:.0f} %" for name, score in tuned.items()
    )
    print(f"tuning changed the held-out answers: {scores}; the merged model is in {run / 'merged'}")


if __name__ == "__main__":
    main()
