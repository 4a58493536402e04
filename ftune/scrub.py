"""Secrets taken out of text: nothing that ftune writes or prints keeps a token or a password.

What is a secret: the value of an environment variable whose name says so (``HF_TOKEN``, ``WANDB_API_KEY``,
``DB_PASSWORD``), of 8 or more characters; the user and the secret parameters of a URL; and what has the form of a
well-known service's token.
"""

from __future__ import annotations

import os
import re
import unicodedata
from functools import cache
from typing import Any

__all__ = ["find_secret", "harmless", "scrub", "scrub_data"]

MASK = "*"
SHORTEST = 8
"""A shorter value is no secret worth the name, and would be found in innocent text."""

_NAMES = re.compile(r"(?:^|_)(?:TOKENS?|KEYS?|PASS|PASSWD|PAT|CREDENTIALS?)$|SECRET|PASSWORD", re.IGNORECASE)
_FORMS = [
    # user:password@ of a URL, or a token alone in front of the @
    ("the user of a URL", re.compile(r"(?<=://)[^/\s@?#\"'<>]+(?=@)")),
    (
        "a secret in a URL",
        re.compile(
            r"(?<=[?&])(?:[\w-]*(?:token|secret|password|signature|credential|api_?key)|key|sig|auth)=([^&\s#\"'<>,]+)",
            re.IGNORECASE,
        ),
    ),
    ("a token", re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[\w-]{20,})")),
]


def scrub(text: str) -> str:
    """The text with every character of a secret as ``*``: what stands at which column stays."""
    return _scrub(text, list(_values()))


def _scrub(text: str, secrets: list[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK * len(secret))
    for _, form in _FORMS:
        text = form.sub(_masked, text)
    return text


def scrub_data(data: Any) -> Any:
    """JSON-able data with every string scrubbed, keys too."""
    secrets = list(_values())  # once, not for every string: the environment is searched through for them

    def scrubbed(data: Any) -> Any:
        if isinstance(data, str):
            return _scrub(data, secrets)
        if isinstance(data, dict):
            return {scrubbed(key) if isinstance(key, str) else key: scrubbed(value) for key, value in data.items()}
        if isinstance(data, list | tuple):
            return [scrubbed(value) for value in data]
        return data

    return scrubbed(data)


def find_secret(text: str) -> str | None:
    """What kind of secret a text holds, in words that do not repeat it; None where there is none."""
    for secret, name in _values().items():
        if secret in text:
            return f"the value of the environment variable {name}"
    return next((what for what, form in _FORMS if form.search(text)), None)


def _masked(match: re.Match[str]) -> str:
    whole, secret = match.group(), match.group(match.lastindex or 0)
    return whole[: len(whole) - len(secret)] + MASK * len(secret)


@cache
def _speaks_of_a_secret(name: str) -> bool:
    return _NAMES.search(name) is not None


def _values() -> dict[str, str]:
    """Secret values of the environment with their names, the longest first: one may hold another."""
    found = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and _speaks_of_a_secret(name) and not _is_path(value)
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _is_path(value: str) -> bool:
    """Whether a value says where something is: SSH_KEY=/home/me/.ssh/id_rsa says where a secret is, and is none.

    Only where it is there: base64 begins with a slash in one of 64 cases.
    """
    if not value.startswith(("/", "~")):
        return False
    try:
        return os.path.lexists(os.path.expanduser(value))
    except (OSError, ValueError):
        return False


def harmless(text: str) -> str:
    """The text with what a terminal obeys or cannot print written out, line breaks and tabs excepted."""
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else c.encode("unicode_escape").decode()
        for c in text
    )
