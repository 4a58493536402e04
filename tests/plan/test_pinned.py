"""A hub model is pinned to its commit: on a cache laid out as the hub's client lays it out, without a network."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny

from ftune.artifacts.run_dir import RunDir
from ftune.data.sources import _commit
from ftune.errors import DataError, ModelError
from ftune.plan.pinned import pin_model, pins, repinned
from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of
from ftune.recipe.schema import DataSource, ModelSpec

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of org/tiny in a cache: main is OLD, and NEW is there too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    repository = tmp_path / "hub/models--org--tiny"
    for commit in (OLD, NEW):
        tiny.model_dir(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(OLD)
    return repository


def test_a_branch_becomes_its_commit(hub: Path) -> None:
    assert pin_model(ModelSpec(id="org/tiny")).revision == OLD
    assert pin_model(ModelSpec(id="org/tiny", revision="main")).revision == OLD
    assert pin_model(ModelSpec(id="org/tiny", revision=NEW)).revision == NEW
    (hub / "refs/main").write_text(NEW)
    assert pin_model(ModelSpec(id="org/tiny")).revision == NEW
    with pytest.raises(ModelError, match="org/absent"):
        pin_model(ModelSpec(id="org/absent"))


def test_a_model_on_this_disk_has_no_commit(tmp_path: Path) -> None:
    spec = ModelSpec(id=str(tiny.model_dir(tmp_path)))
    assert pin_model(spec) == spec


def test_a_run_keeps_its_commit_when_the_branch_moves(hub: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, model={"id": "org/tiny"}).recipe
    plan = resolve(recipe)
    assert plan.recipe.model.revision == OLD
    assert plan.context.revision == OLD  # what PEFT's files and the card say
    run = RunDir(tmp_path)
    run.write(
        {"pinned": pins(recipe, plan.recipe), "resolved": plan.recipe.model_dump(mode="json"), "plan": summary_of(plan)}
    )
    assert json.loads(run.record_path.read_text())["pinned"]["model"] == {"asked": None, "commit": OLD}

    (hub / "refs/main").write_text(NEW)
    assert run.recipe().model.revision == OLD  # eval, merge, chat
    assert resolve(run.as_begun(recipe)).recipe.model.revision == OLD  # --resume, and eval RECIPE
    assert resolve(recipe).recipe.model.revision == NEW
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": NEW})})
    assert run.as_begun(other).model.revision == NEW  # asked for: then a resume is refused


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of ``datasets``, without a network, with org/rows of OLD; returns where its commits are."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    commits = tmp_path / "datasets/org___rows/default/0.0.0"
    _cache(commits / OLD, tiny.write_chats(tmp_path / "old.jsonl", 8))
    return commits


def _cache(directory: Path, file: Path) -> None:
    """Put a file's rows there as ``datasets`` keeps those of a hub data set's commit."""
    from datasets import load_dataset

    made = load_dataset("json", data_files=str(file), cache_dir=str(directory.parents[4] / f"made-{file.stem}"))
    arrow = Path(made["train"].cache_files[0]["filename"])
    directory.mkdir(parents=True)
    (directory / "rows-train.arrow").write_bytes(arrow.read_bytes())
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    info["dataset_name"] = info["splits"]["train"]["dataset_name"] = "rows"
    (directory / "dataset_info.json").write_text(json.dumps(info))


def test_a_run_keeps_the_commit_of_its_data_or_is_refused(cached: Path, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": DataSource(path="org/rows")})})
    plan = resolve(asked)
    assert plan.recipe.data.train.revision == OLD
    run = RunDir(tmp_path)
    run.write(
        {"pinned": pins(asked, plan.recipe), "resolved": plan.recipe.model_dump(mode="json"), "plan": summary_of(plan)}
    )
    assert json.loads(run.record_path.read_text())["pinned"]["data.train"] == {"asked": None, "commit": OLD}
    assert resolve(run.as_begun(asked)).recipe.data.train.revision == OLD

    # another run has read a newer one since: `datasets` gives that, whatever revision is asked for
    _cache(cached / NEW, tiny.write_chats(tmp_path / "new.jsonl", 9))
    os.utime(cached / NEW, (2e9, 2e9))
    assert resolve(asked).recipe.data.train.revision == NEW
    with pytest.raises(DataError, match=f"revision {OLD} was asked for, but the local cache gives {NEW}"):
        resolve(run.as_begun(asked))


def test_data_sets_are_pinned_too(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": DataSource(path="org/rows")})})
    pinned = {"data.train": {"asked": None, "commit": OLD}}
    assert repinned(asked, pinned).data.train.revision == OLD
    assert repinned(asked, pinned).data.eval == recipe.data.eval

    class Info:
        download_checksums = {f"hf://datasets/org/rows@{OLD}/train.parquet": {}}

    class Set:
        info, cache_files = Info(), [{"filename": f"/cache/org___rows/default/0.0.0/{OLD}/rows-train.arrow"}]

    assert _commit(Set()) == OLD
    Set.cache_files = [{"filename": f"/cache/{NEW}/x.arrow"}]
    assert _commit(Set()) is None
