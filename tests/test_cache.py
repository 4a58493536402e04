"""The cache: where it is, that entries appear whole, and which of them go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftune.cache import cache_dir, publish, touch
from ftune.errors import FtuneError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FTUNE_CACHE_GIB", raising=False)
    return tmp_path / "cache"


def entry(kind: str, name: str, size: int = 10, age: float = 0) -> Path:
    directory = cache_dir(kind)
    assert directory is not None

    def write(path: Path) -> None:
        path.write_bytes(b"x" * size)

    assert publish(directory / name, write)
    now = os.stat(directory / name).st_mtime
    os.utime(directory / name, (now - age, now - age))
    return directory / name


def test_the_root_is_asked_for_in_three_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert cache_dir("tokens") == tmp_path / "a" / "tokens"
    monkeypatch.delenv("FTUNE_CACHE")
    assert cache_dir("tokens") == tmp_path / "b" / "ftune" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir("tokens") == tmp_path / "c" / ".cache" / "ftune" / "tokens"
    assert (tmp_path / "c" / ".cache" / "ftune").stat().st_mode & 0o077 == 0


def test_a_root_that_cannot_be_made_turns_caching_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "file" / "below"))
    assert cache_dir("tokens") is None


def test_no_home_turns_caching_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache_dir("tokens") is None


def test_a_limit_of_zero_turns_caching_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE_GIB", "0")
    assert cache_dir("tokens") is None
    assert not root.exists()


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FTUNE_CACHE_GIB", text)
    with pytest.raises(FtuneError, match=f"FTUNE_CACHE_GIB={text}"):
        cache_dir("tokens")


def test_publish_replaces_a_file_and_keeps_a_directory(root: Path) -> None:
    path = entry("tokens", "a", size=3)
    entry("tokens", "a", size=5)
    assert path.stat().st_size == 5

    def tree(text: str) -> bool:
        def write(to: Path) -> None:
            to.mkdir()
            (to / "part").write_text(text)

        return publish(path.with_name("tree"), write)

    assert tree("first")
    assert tree("second")
    assert (path.with_name("tree") / "part").read_text() == "first"
    assert sorted(p.name for p in path.parent.iterdir()) == ["a", "tree"]


def test_publish_shows_nothing_before_it_is_whole(root: Path) -> None:
    directory = cache_dir("tokens")
    assert directory is not None
    path = directory / "a"

    def write(to: Path) -> None:
        to.write_text("half")
        assert not path.exists()
        assert to.parent == directory

    assert publish(path, write)
    assert path.read_text() == "half"


def test_a_failed_write_leaves_no_trace(root: Path) -> None:
    directory = cache_dir("tokens")
    assert directory is not None

    def full(to: Path) -> None:
        to.write_text("half")
        raise OSError(28, "No space left on device")

    def broken(to: Path) -> None:
        to.mkdir()
        (to / "part").write_text("half")
        raise KeyError("a mistake of the caller")

    assert not publish(directory / "a", full)
    with pytest.raises(KeyError):
        publish(directory / "a", broken)
    assert list(directory.iterdir()) == []


def test_the_least_recently_used_entries_go_first(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE_GIB", str(250 / 2**30))
    oldest = entry("tokens", "oldest", size=100, age=300)
    used = entry("weights", "used", size=100, age=200)
    touch(oldest)
    new = entry("tokens", "new", size=100)
    assert oldest.exists()
    assert new.exists()
    assert not used.exists()


def test_a_new_entry_stays_whatever_its_size(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = entry("tokens", "old", size=100, age=-1000)  # by its clock newer than what comes
    monkeypatch.setenv("FTUNE_CACHE_GIB", str(50 / 2**30))
    new = entry("tokens", "new", size=100)
    assert new.exists()
    assert not old.exists()


def test_directories_count_whole_and_abandoned_files_go(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = entry("tokens", "small").parent / "tree"
    tree.mkdir()
    (tree / "part").write_bytes(b"x" * 1000)
    os.utime(tree, (0, 0))
    abandoned, writing = tree.with_name(".a.tmp"), tree.with_name(".b.tmp")
    abandoned.write_text("")
    os.utime(abandoned, (0, 0))
    writing.write_text("")
    monkeypatch.setenv("FTUNE_CACHE_GIB", str(500 / 2**30))
    entry("tokens", "new")
    assert not tree.exists()
    assert not abandoned.exists()
    assert writing.exists()


def test_nothing_but_the_standard_library_is_imported() -> None:
    code = (
        "import sys; before = set(sys.modules); import ftune.cache; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["ftune"]


def test_tests_do_not_use_the_cache_of_the_user() -> None:
    directory = cache_dir("tokens")
    assert directory is not None
    assert Path.home() not in directory.parents
    assert directory.is_relative_to(Path(os.environ["FTUNE_CACHE"]))


def test_what_others_keep_in_the_root_is_never_deleted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "photos").mkdir(parents=True)
    (root / "photos/a.jpg").write_bytes(b"x" * 1000)
    (root / "tokens").mkdir()  # not made by ftune, though of that name
    (root / "tokens/mine.txt").write_bytes(b"x" * 1000)
    for path in root.glob("*/*"):
        os.utime(path, (0, 0))
    monkeypatch.setenv("FTUNE_CACHE_GIB", str(100 / 2**30))
    entry("tokens", "a")
    entry("gguf", "b", size=90)
    entry("gguf", "c", size=90)
    assert (root / "photos/a.jpg").exists()
    assert (root / "tokens/mine.txt").exists()
    assert not (root / "gguf/b").exists()


def test_a_cache_of_an_older_version_is_pruned_where_only_ftune_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = tmp_path / "ftune/tokens/old"
    old.parent.mkdir(parents=True)  # without the mark that this version leaves
    old.write_bytes(b"x" * 1000)
    os.utime(old, (0, 0))
    monkeypatch.setenv("FTUNE_CACHE_GIB", str(100 / 2**30))
    entry("tokens", "new")
    assert not old.exists()


def test_a_cache_that_everybody_can_write_is_not_used(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cache_dir("tokens") is not None
    for part in (root, root / "tokens"):
        mode = part.stat().st_mode
        part.chmod(mode | 0o002)
        assert cache_dir("tokens") is None
        part.chmod(mode)
    assert capsys.readouterr().err.count("everybody may write there") == 1
    assert cache_dir("tokens") is not None
