"""What every test shares: the flag that re-records golden files, and a cache that is not the user's."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

# A busy machine is no failure: hypothesis times each example, and fails the slow ones.
_UNTIMED = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
}
hypothesis.settings.register_profile("fast", max_examples=100, **_UNTIMED)
# What `--hypothesis-profile=fuzz` runs: tests that set no number of examples themselves make so many each.
hypothesis.settings.register_profile("fuzz", max_examples=2_500, **_UNTIMED)
# Before the option is read, which loads another over it.
hypothesis.settings.load_profile("fast")

_modules_frozen = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-golden", action="store_true", help="write golden files instead of comparing (make golden)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that takes longest, lest one process be left alone with it."""
    items.sort(key=lambda item: item.path.parent.name != "smoke")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what is cached in this session's own directory; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FTUNE_CACHE_GIB", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Let no test wait for the disk: a run asks it a dozen times to keep what was written through a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _imports_are_no_garbage() -> None:
    """Take what imported modules hold out of the garbage collector's sight.

    Every run collects garbage before it measures its peak, and half a million objects of torch, transformers and peft
    cost as much as the training of a tiny model.
    """
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + 20:
        gc.collect()
        gc.freeze()
        _modules_frozen = len(sys.modules)


@pytest.fixture(autouse=True)
def _same_random_weights() -> None:
    """Start each test at one seed: a model made at random is the same one in every run, whichever tests ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compare a text with a committed file, or write that file under --record-golden."""
    record = request.config.getoption("--record-golden")

    def compare(path: Path, text: str) -> None:
        if record:
            path.write_text(text, encoding="utf-8")
            return
        assert path.exists(), f"{path.name} is not recorded yet: run with --record-golden"
        assert text == path.read_text(encoding="utf-8")

    return compare
