"""Versions of installed packages."""

from __future__ import annotations

from importlib import metadata

import pytest

from ftune.installed import version_of


def test_a_package_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[str] = []
    found = metadata.version

    def counting(package: str) -> str:
        looked_up.append(package)
        return found(package)

    monkeypatch.setattr(metadata, "version", counting)
    version_of.cache_clear()
    assert [version_of("pydantic"), version_of("pydantic")] == [found("pydantic")] * 2
    assert [version_of("no-such-package"), version_of("no-such-package")] == [None, None]
    assert looked_up == ["pydantic", "no-such-package"]
