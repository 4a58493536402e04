"""Write the table of methods and engines in docs/distributed.md by running it: two processes for each engine.

    python scripts/make_engine_table.py            # rewrites the section `Methods and engines`

Every method trains the tests' tiny model for four updates over gloo; what finishes works, what ftune refuses before
it loads a model is refused. Anything else stops the script: there is no third kind. DeepSpeed must be installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- engines: made by scripts/make_engine_table.py -->", "<!-- engines: end -->"
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "full, optimizer adamw_8bit": ("full", {"optimizer": {"name": "adamw_8bit"}}),
    "galore, per_layer": (
        "galore",
        {
            "method": {"per_layer": True},
            "training": {"gradient_accumulation_steps": 1, "max_grad_norm": None},
        },
    ),
}
"""Settings of a method that an engine refuses though it runs the method."""

EACH = """
import json, os, sys
from pathlib import Path
from ftune.artifacts.training import train
from ftune.errors import FtuneError, RunFailed
from ftune.recipe import load_checked
# Or ZeRO-3 would leave all of the tiny model whole.
import ftune.memory.sharding
ftune.memory.sharding.PERSISTENT = 0
engine, where, found = sys.argv[1], Path(sys.argv[2]), {}
for name, path in json.loads((where / "recipes.json").read_text()).items():
    try:
        train(load_checked(Path(path))[0], progress=False, engine=engine)
        found[name] = "works"
    except RunFailed:
        raise
    except FtuneError as error:
        found[name] = f"refused: {error}"
if os.environ["RANK"] == "0":
    (where / f"{engine}.json").write_text(json.dumps(found))
"""


def recipes(where: Path) -> dict[str, Path]:
    """A recipe on the tiny model for every method and variant, by the name of its row."""
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny

    from ftune.methods import METHODS

    found = {}
    for number, (row, (method, blocks)) in enumerate(({name: (name, {}) for name in METHODS} | VARIANTS).items()):
        settings = {key: dict(value) for key, value in blocks.items()}
        settings["method"] = tiny.SETTINGS.get(method, {}) | settings.get("method", {})
        loaded = tiny.recipe(where, method, **settings, output_dir=str(where / f"run-{number}"))
        found[row] = where / f"{number}.yaml"
        found[row].write_text(loaded.text)
    return found


def measure(engine: str, where: Path) -> dict[str, str]:
    """What two processes found under an engine, by row."""
    where.mkdir()
    (where / "recipes.json").write_text(json.dumps({row: str(path) for row, path in recipes(where).items()}))
    (where / "each.py").write_text(EACH)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, str(where / "each.py"), engine, str(where)], env=environment, check=True)
    return dict(json.loads((where / f"{engine}.json").read_text()))


def cell(verdict: str) -> str:
    """In one line, without what the column says already; what an error adds below is for the terminal."""
    return re.sub(r"engine `[^`]+` cannot run this recipe: (method\.name: )?", "", " ".join(verdict.split()))


def table(found: dict[str, dict[str, str]]) -> str:
    """Rows of methods, columns of engines."""
    rows = list(next(iter(found.values())))
    cells = [[row, *(cell(found[engine][row]) for engine in found)] for row in rows]
    lines = [["method", *found], ["---"] * (len(found) + 1), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure, and replace the table."""
    from ftune.plan.engine import ENGINES

    with tempfile.TemporaryDirectory() as scratch:
        found = {engine: measure(engine, Path(scratch) / engine) for engine in ENGINES}
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}")


if __name__ == "__main__":
    main()
