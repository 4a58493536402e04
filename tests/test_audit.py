"""scripts/audit.py: a service that cannot be asked never reads as one that found nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / "scripts/audit.py"
CLEAN = {"name": "torch", "version": "2.13.0", "vulns": []}
UNKNOWN = {"name": "idna", "skip_reason": "Dependency not found on PyPI and could not be audited: idna (3.1)"}
VULNERABLE = {"name": "jinja2", "version": "2.4.1", "vulns": [{"id": "PYSEC-2014-8", "fix_versions": ["2.7.2"]}]}

# pip-audit's place: answers from a file by service, first for the version that is known to be vulnerable
FAKE = """#!/bin/sh
case "$*" in *known.txt) asked=known;; *) asked=pins;; esac
answer="{answers}/$2-$asked"
[ -f "$answer" ] || {{ echo "ConnectionError: no route to $2" >&2; exit 1; }}
cat "$answer"
exit 1
"""


def _run(tmp_path: Path, answers: dict[str, list[dict[str, object]]], *options: str) -> tuple[int, str, str]:
    command = tmp_path / "env/bin/pip-audit"
    command.parent.mkdir(parents=True)
    command.write_text(FAKE.format(answers=tmp_path))
    command.chmod(0o755)
    for name, packages in answers.items():
        (tmp_path / name).write_text(json.dumps({"dependencies": packages, "fixes": []}))
    arguments = [sys.executable, str(AUDIT), "--environment", str(tmp_path / "env"), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_what_is_vulnerable_fails_with_the_version_that_is_not(tmp_path: Path) -> None:
    answers = {"pypi-known": [VULNERABLE], "pypi-pins": [CLEAN, VULNERABLE, UNKNOWN]}
    code, out, _ = _run(tmp_path, answers)
    assert code == 1
    assert "jinja2 2.4.1: PYSEC-2014-8, mended in 2.7.2" in out
    assert "audited: " not in out


def test_nothing_vulnerable_is_said_with_who_said_it(tmp_path: Path) -> None:
    code, out, err = _run(tmp_path, {"osv-known": [VULNERABLE], "osv-pins": [CLEAN]})
    assert (code, out, err) == (0, "audited: osv knows no vulnerabilities of 1 packages\n", "")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({}, "osv: ConnectionError: no route to osv"),
        # a mirror of PyPI: it knows packages, or none, and no vulnerabilities
        ({"pypi-known": [{**VULNERABLE, "vulns": []}], "pypi-pins": [CLEAN]}, "pypi: it does not know that jinja2"),
        ({"pypi-known": [UNKNOWN], "pypi-pins": [UNKNOWN]}, "pypi: it does not know that jinja2"),
        ({"pypi-known": [VULNERABLE], "pypi-pins": [CLEAN, UNKNOWN]}, "pypi does not know: idna"),
        ({"pypi-known": [VULNERABLE]}, "pypi: ConnectionError: no route to pypi"),
    ],
)
def test_without_an_answer_it_says_not_audited_and_fails_where_required(
    tmp_path: Path, answers: dict[str, list[dict[str, object]]], reason: str
) -> None:
    code, out, err = _run(tmp_path, answers, "--require")
    assert (code, out) == (3, "")
    assert err.startswith("NOT AUDITED for known vulnerabilities:\n")
    assert reason in err
    (tmp_path / "again").mkdir()
    assert _run(tmp_path / "again", answers)[0] == 0
