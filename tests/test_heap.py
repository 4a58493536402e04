"""The heap's settings reach a process that trains, once, and nobody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftune import heap

TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


@pytest.fixture(autouse=True)
def _glibc_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_is_glibc", lambda: True)
    monkeypatch.setattr(heap, "_GPUS", ())


def test_the_variable_is_added_to_the_environment() -> None:
    assert heap.tuned({"HOME": "/h"}) == {"HOME": "/h", "GLIBC_TUNABLES": TUNABLES}


def test_other_tunables_stay() -> None:
    environment = heap.tuned({"GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=1024"})
    assert environment == {"GLIBC_TUNABLES": f"glibc.rtld.optional_static_tls=1024:{TUNABLES}"}


@pytest.mark.parametrize(
    "environment", [{"LD_PRELOAD": "libjemalloc.so.2"}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}]
)
def test_the_users_own_choice_stays(environment: dict[str, str]) -> None:
    assert heap.tuned(environment) is None


def test_nothing_is_changed_twice() -> None:
    once = heap.tuned({})
    assert once is not None
    assert heap.tuned(once) is None


def test_not_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_GPUS", (os.devnull,))
    assert heap.tuned({}) is None


def test_not_with_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "_is_glibc", lambda: False)
    assert heap.tuned({}) is None


class _Replaced(Exception):
    pass


@pytest.fixture
def _untuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch, _untuned: None) -> list[tuple[str, list[str], dict[str, str]]]:
    calls: list[tuple[str, list[str], dict[str, str]]] = []

    def execve(path: str, arguments: list[str], environment: dict[str, str]) -> None:
        calls.append((path, arguments, environment))
        raise _Replaced

    monkeypatch.setattr(os, "execve", execve)
    return calls


@pytest.mark.parametrize("start", [["/venv/bin/ftune"], ["-m", "ftune"], ["-u", "-m", "ftune"]])
def test_the_command_is_begun_again_as_it_was(
    monkeypatch: pytest.MonkeyPatch, replaced: list[tuple[str, list[str], dict[str, str]]], start: list[str]
) -> None:
    first = "/venv/lib/ftune/__main__.py" if "-m" in start else start[0]
    monkeypatch.setattr(sys, "argv", [first, "train", "a b.yaml"])
    monkeypatch.setattr(sys, "orig_argv", ["python", *start, "train", "a b.yaml"])
    with pytest.raises(_Replaced):
        heap.begin_again()
    ((path, arguments, environment),) = replaced
    assert (path, arguments) == (sys.executable, ["python", *start, "train", "a b.yaml"])
    assert environment["GLIBC_TUNABLES"] == TUNABLES


@pytest.mark.parametrize("argv", [["/a/pytest", "train", "x"], ["/venv/bin/ftune", "other"], ["/venv/bin/ftune"]])
def test_another_program_is_not_begun_again(
    monkeypatch: pytest.MonkeyPatch, replaced: list[tuple[str, list[str], dict[str, str]]], argv: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", ["python", argv[0], "train", "x"])
    heap.begin_again()
    assert replaced == []


@pytest.mark.usefixtures("_untuned")
def test_a_run_goes_on_where_it_cannot_be_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def execve(*_: object) -> None:
        raise PermissionError("no")

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["/venv/bin/ftune", "train", "x"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "/venv/bin/ftune", "train", "x"])
    heap.begin_again()


PROGRAM = """
import os, sys
from ftune import cli
def trained(*_, **__):
    print(os.getpid() == int(sys.argv[-1].removeprefix("x=")), os.environ.get("GLIBC_TUNABLES"))
    raise SystemExit(0)
cli.app = trained
cli.main()
"""


@pytest.mark.skipif(heap.tuned({}) is None, reason="nothing to tune on this machine")
@pytest.mark.parametrize(("command", "expected"), [("train", TUNABLES), ("validate", "None")])
def test_a_real_process_keeps_its_number_and_only_train_begins_again(
    tmp_path: Path, command: str, expected: str
) -> None:
    script = tmp_path / "__main__.py"
    script.write_text(PROGRAM, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "LD_PRELOAD")}
    shell = f'exec "{sys.executable}" "{script}" {command} x=$$'
    done = subprocess.run(["sh", "-c", shell], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", expected]


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_segments_grow_unless_the_user_says_otherwise(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {} if own is None else {own: "max_split_size_mb:64"}
    monkeypatch.setattr(os, "environ", environment)
    heap.expand_segments()
    assert environment == {
        own or "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64" if own else "expandable_segments:True"
    }
