"""Print the oldest versions that pyproject.toml admits, as constraints for pip: `make test-floor` installs them.

What the package and its extras ask for is held to its lower bound. Two kinds are not: torch, whose build depends on
the machine, and the tools of `dev`, which no user installs.

Usage::

    python scripts/oldest.py > constraints
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
BOUND = re.compile(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)")


def oldest(text: str) -> list[str]:
    """The constraints for a pyproject.toml, one ``name==version`` each; a requirement without a bound is an error."""
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    found = []
    for line in asked:
        if line.startswith(f"{project['name']}["):  # an extra that takes in another
            continue
        bound = BOUND.match(line)
        if bound is None:
            raise SystemExit(f"error: pyproject.toml: `{line}` has no lower bound")
        if bound[1] != "torch":
            found.append(f"{bound[1]}=={bound[2]}")
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(oldest(PYPROJECT.read_text(encoding="utf-8"))))
