"""A plugin of pytest that leaves only the tests whose code or parameters name bfloat16."""

from __future__ import annotations

import inspect

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        assert isinstance(item, pytest.Function)
        given = item.callspec.params if hasattr(item, "callspec") else {}
        left["bfloat16" in f"{inspect.getsource(item.function)} {given}"].append(item)
    config.hook.pytest_deselected(items=left[False])
    items[:] = left[True]
