"""Look the pinned packages up among known vulnerabilities, with pip-audit in an environment of its own.

    python scripts/audit.py              # 1 where something is vulnerable, 0 otherwise
    python scripts/audit.py --require    # 3 where nobody could be asked

Asked are PyPI, then OSV. A service that cannot be reached, or an index in its place that knows packages but no
vulnerabilities, must not read as an audit that found nothing: each is first asked for a version that is known to be
vulnerable, and what it does not answer for is named. pip-audit stays out of ``.venv``: what it needs would be audited
along, and be installed where it is not needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PIP_AUDIT = "pip-audit==2.10.1"
SERVICES = ("pypi", "osv")
KNOWN = "jinja2==2.4.1"
"""Vulnerable since 2014: a service that does not say so is none."""


class NotAudited(Exception):
    """Nobody could be asked, or not about everything."""


def installed(directory: Path) -> Path:
    """pip-audit in an environment under ``directory``, made where it is missing.

    Raises:
        NotAudited: It cannot be installed.
    """
    command = directory / "bin/pip-audit"
    if not command.exists():
        venv.create(directory, with_pip=True, clear=True)
        done = subprocess.run(
            [directory / "bin/python", "-m", "pip", "install", "--quiet", PIP_AUDIT], capture_output=True, text=True
        )
        if done.returncode:
            raise NotAudited(f"{PIP_AUDIT} could not be installed: {_last(done.stderr)}")
    return command


def ask(command: Path, service: str, requirements: Path) -> list[dict[str, Any]]:
    """What a service says of every requirement: ``name``, and ``version`` and ``vulns`` or a ``skip_reason``.

    Raises:
        NotAudited: It did not answer.
    """
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--timeout", "15", "--format", "json"]
    try:
        done = subprocess.run(
            [command, "--vulnerability-service", service, *options, "--requirement", requirements],
            capture_output=True,
            text=True,
            timeout=600,
        )
        # the exit code is 1 for what is vulnerable, and for what went wrong
        found: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        raise NotAudited(f"{service}: {_last(done.stderr)}") from None
    except subprocess.TimeoutExpired:
        raise NotAudited(f"{service}: no answer within ten minutes") from None
    return found


def service_that_knows(command: Path) -> str:
    """The first service that calls a vulnerable version vulnerable.

    Raises:
        NotAudited: None does.
    """
    reasons = []
    with tempfile.TemporaryDirectory() as scratch:
        known = Path(scratch) / "known.txt"
        known.write_text(KNOWN + "\n")
        for service in SERVICES:
            try:
                if any(package.get("vulns") for package in ask(command, service, known)):
                    return service
                reasons.append(f"{service}: it does not know that {KNOWN} is vulnerable")
            except NotAudited as error:
                reasons.append(str(error))
    raise NotAudited("\n  ".join(reasons))


def audit(command: Path, requirements: Path) -> int:
    """Print what is vulnerable; the number of packages that are.

    Raises:
        NotAudited: Of some packages, nothing is known.
    """
    service = service_that_knows(command)
    packages = ask(command, service, requirements)
    vulnerable = [package for package in packages if package.get("vulns")]
    for package in vulnerable:
        for vulnerability in package["vulns"]:
            mended = ", ".join(vulnerability.get("fix_versions", [])) or "no version yet"
            print(f"{package['name']} {package['version']}: {vulnerability['id']}, mended in {mended}")
    unknown = [package["name"] for package in packages if "vulns" not in package]
    if vulnerable:
        print(f"{len(vulnerable)} of {len(packages)} packages have known vulnerabilities, says {service}")
    elif not unknown and packages:
        print(f"audited: {service} knows no vulnerabilities of {len(packages)} packages")
    else:
        raise NotAudited(f"{service} does not know: {', '.join(unknown) or 'any package'}")
    return len(vulnerable)


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1][:300]


def main() -> int:
    """The exit code: 0, 1 for vulnerable packages, 3 for no audit where it is required."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--require", action="store_true", help="fail where the audit could not be made")
    parser.add_argument("--requirements", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--environment", type=Path, default=ROOT / "build/audit")
    options = parser.parse_args()
    try:
        return 1 if audit(installed(options.environment), options.requirements) else 0
    except NotAudited as error:
        print(f"NOT AUDITED for known vulnerabilities:\n  {error}", file=sys.stderr)
        return 3 if options.require else 0


if __name__ == "__main__":
    sys.exit(main())
