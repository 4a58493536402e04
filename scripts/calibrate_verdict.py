"""How often the verdict of `ftune compare` is wrong, and how often it finds what was predicted, in made-up studies.

Prints the tables of docs/statistics.md: ``PYTHONPATH=.:tests python scripts/calibrate_verdict.py --studies 1000``.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from experiments_studies import study

from ftune.artifacts.paired import Scores, checked, difference, paired
from ftune.experiments.against import compare, related
from ftune.experiments.power import needed
from ftune.experiments.ties import holm

DRAWS = 2000
FALSE: list[dict[str, Any]] = [
    *({"seeds": 1, "items": items, "methods": 4} for items in (50, 200, 1000)),
    {"seeds": 1, "items": 1000, "methods": 4, "seed_noise": 0.03},
    *({"seeds": 2, "items": 1000, "methods": 4, "seed_noise": noise} for noise in (0.0, 0.01, 0.03)),
    *({"seeds": 3, "items": items, "methods": 4, "seed_noise": 0.03} for items in (50, 200)),
    *({"seeds": 3, "items": 1000, "methods": 4, "seed_noise": noise} for noise in (0.0, 0.01, 0.03, 0.1)),
    {"seeds": 3, "items": 1000, "methods": 4, "seed_noise": 0.03, "graded": True},
    *({"seeds": 3, "items": 1000, "methods": methods, "seed_noise": 0.03} for methods in (1, 12)),
    *({"seeds": 3, "items": 1000, "methods": 4, "seed_noise": 0.03, "noisy": name} for name in ("lora", "m0")),
    {"seeds": 5, "items": 1000, "methods": 4, "seed_noise": 0.03},
]
FOUND: list[tuple[dict[str, Any], float]] = [
    ({"seeds": 1, "methods": 4}, 0.04),
    ({"seeds": 2, "methods": 4}, 0.06),
    ({"seeds": 3, "methods": 1}, 0.04),
    ({"seeds": 3, "methods": 4}, 0.04),
    ({"seeds": 3, "methods": 12}, 0.04),
    ({"seeds": 3, "methods": 4, "seed_noise": 0.01}, 0.06),
    ({"seeds": 5, "methods": 4, "seed_noise": 0.005}, 0.04),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=1000)
    studies = parser.parse_args().studies
    print("| seeds | items | a seed moves a score by SD | methods | false `better` | by a bootstrap |")
    print("|---|---|---|---|---|---|")
    for made in FALSE:
        rng, weights = np.random.default_rng(0), _weights(made)
        false = np.zeros(2)
        for _ in range(studies):
            known = checked(study(rng, **made), "base")
            false += _better(known), _better_by_bootstrap(known, *weights)
        noise = _points(made.get("seed_noise", 0))
        noise += f", that of {made['noisy']} by 5 times as much" if "noisy" in made else ""
        scores = f"{made['items']:,}{', graded' if made.get('graded') else ''}"
        ours, theirs = (f"{rate:.1%}" for rate in false / studies)
        print(f"| {made['seeds']} | {scores} | {noise} | {made['methods']} | {ours} | {theirs} |", flush=True)
    print("\n| seeds | a seed moves a score by SD | methods | difference | predicted items | found |")
    print("|---|---|---|---|---|---|")
    for made, delta in FOUND:
        rng = np.random.default_rng(0)
        earlier = study(rng, **{**made, "seeds": 100, "items": 3000})
        spread = difference(paired(earlier["m0"], earlier["lora"])).spread
        items = needed(delta, spread, made["seeds"], comparisons=made["methods"] + 1)
        assert items is not None
        found = 0
        for _ in range(studies):
            known = checked(study(rng, items=items, better_by=delta, **made), "base")
            found += "m0" in related(compare(known, known, "lora", margin=0.01, alpha=0.05), "better")
        noise = _points(made.get("seed_noise", 0))
        print(
            f"| {made['seeds']} | {noise} | {made['methods']} | {_points(delta)} | {items:,} | {found / studies:.0%} |",
            flush=True,
        )


def _points(share: float) -> str:
    return f"{100 * share:g} point{'s' * (share != 0.01)}"


def _better(known: dict[str, Scores]) -> bool:
    """Whether any method is called better than LoRA."""
    return bool(set(related(compare(known, known, "lora", margin=0.01, alpha=0.05), "better")) - {"base"})


def _weights(made: dict[str, Any]) -> tuple[Scores, Scores]:
    """How often a bootstrap draws each seed (draws, S) and each item (N, draws), as shares."""
    rng, (seeds, items) = np.random.default_rng(1), (made["seeds"], made["items"])
    return (
        rng.multinomial(seeds, [1 / seeds] * seeds, size=DRAWS) / seeds,
        rng.multinomial(items, [1 / items] * items, size=DRAWS).T / items,
    )


def _better_by_bootstrap(known: dict[str, Scores], by_seed: Scores, by_item: Scores) -> bool:
    """The same by the percentiles of a bootstrap over seeds and items together, with Holm's correction."""
    p = {}
    for name in known:
        if name != "lora":
            means = np.einsum("bs,sb->b", by_seed, paired(known[name], known["lora"]) @ by_item)
            p[name] = 2 * min(float((means <= 0).mean()), 0.5)
    return any(adjusted < 0.05 and name != "base" for name, adjusted in holm(p).items())


if __name__ == "__main__":
    main()
