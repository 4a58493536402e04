"""Tasks of lm-evaluation-harness: found by name or in a YAML file, with their data, before a model is loaded.

What is wrong with a task is the user's to mend, whoever says so: the harness, the data set, the network or a template.
So all that needs no model is done here, down to the first prompt of each task.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftune.errors import FtuneError
from ftune.installed import version_of
from ftune.recipe.spelling import closest
from ftune.regular import read_regular

__all__ = ["Tasks", "check_names", "load_tasks"]

MAX_FILE_BYTES = 1_000_000
SEED = 1234
"""Of the draw of solved examples: the harness's own, so that numbers are those that others publish."""
_FORMATS = ("json", "csv", "parquet", "text", "arrow")
"""What `datasets` calls files of these formats: not the name of a data set."""
_NETWORK = ("Offline", "Connection", "LocalEntryNotFound", "HfHubHTTP", "DatasetNotFound", "Timeout", "ConnectError")
"""In the names of what is raised where a data set is not here and cannot be had."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to be run.

    Attributes:
        names: As they were asked for.
        tasks: The harness's tasks by their names, those of groups among them.
        groups: Its groups likewise.
        shown: Names of the tasks and groups that stand for what was asked.
        limit: Items of each task, from the first; None: all.
        shots: Solved examples before each item; None: as each task has it.
    """

    names: tuple[str, ...]
    tasks: dict[str, Any]
    groups: dict[str, Any]
    shown: frozenset[str]
    limit: int | None
    shots: int | None


def check_names(names: Sequence[str]) -> None:
    """Hold, without the harness's import, that there may be such tasks.

    Raises:
        FtuneError: None is named, one is named twice, a file is no task, or the harness is not installed.
    """
    if not names or not all(name.strip() for name in names):
        raise FtuneError("no task is named", help="name tasks of lm-evaluation-harness, or YAML files: hellaswag")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise FtuneError(f"task `{twice[0]}` is named twice")
    for name in filter(_is_file, names):
        _read_file(name)
    if version_of("lm_eval") is None:
        raise FtuneError("tasks need lm-evaluation-harness", help="pip install 'ftune[eval]'")


def load_tasks(names: Sequence[str], *, limit: int | None = None, shots: int | None = None) -> Tasks:
    """Find tasks, load their data, and make the first prompt of each.

    Args:
        names: Names that the harness knows (tasks, groups, tags), or YAML files of tasks or groups.
        limit: Items of each task, from the first; None: all.
        shots: Solved examples before each item, but for tasks that always have none; None: as each task has it.

    Raises:
        FtuneError: A task is unknown or cannot work, or its data are not here and cannot be had.
    """
    check_names(names)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    files = {name: _read_file(name) for name in names if _is_file(name)}
    # The index of all that the harness has takes seconds; files of tasks do without.
    groups_in = sorted({str(Path(name).expanduser().parent) for name, block in files.items() if "group" in block})
    manager = TaskManager(include_path=groups_in or None, include_defaults=bool(groups_in) or len(files) < len(names))
    unknown = [name for name in names if name not in files and name not in manager.task_index]
    if unknown:
        raise _unknown(unknown[0], manager.all_tasks)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    shown: set[str] = set()
    for name in names:
        block = files.get(name)
        try:
            found = manager.load([name if block is None else _spec(Path(name).expanduser(), block)])
            for task in found["tasks"].values():
                _prepare(task, shots)
        except Exception as error:  # whatever the harness, a data set or a task's own code raises
            raise _refused(name, error) from error
        if both := found["tasks"].keys() & tasks.keys():
            raise FtuneError(f"task `{min(both)}` is asked for twice: by its name or file, or as part of a group")
        tasks |= found["tasks"]
        groups |= found.get("groups", {})
        group = found.get("groups", {}).get(name if block is None else block.get("group"))
        shown |= set(found["tasks"]) if group is None else _stand_for(group)
    return Tasks(tuple(names), tasks, groups, frozenset(shown), limit, shots)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) or "/" in name


class _Loader(yaml.SafeLoader):
    """YAML in which the harness's ``!function`` is a text: nothing is imported."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _read_file(name: str) -> dict[str, Any]:
    """A file's block as it stands.

    Raises:
        FtuneError: It cannot be read, or is no task and no group.
    """
    path = Path(name).expanduser()
    try:
        block = yaml.load(read_regular(path, MAX_FILE_BYTES, follow=True), Loader=_Loader)
    except FileNotFoundError:
        near = closest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else None
        raise FtuneError(
            f"there is no task file {name}", help=f"did you mean `{path.with_name(near)}`?" if near else None
        ) from None
    except OSError as error:
        raise FtuneError(f"the task file {name} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        raise FtuneError(f"{where} is not YAML: {getattr(error, 'problem', None) or error}") from error
    if isinstance(block, dict) and isinstance(block.get("group", block.get("task")), str):
        return block
    what = "a recipe of ftune" if isinstance(block, dict) and "method" in block else "no task"
    raise FtuneError(
        f"{name} is {what}: a task of lm-evaluation-harness has a field `task` with its name, a group a field `group`",
        help="an example of a task file: docs/compare.md#tasks",
    )


def _spec(path: Path, block: dict[str, Any]) -> Any:
    """What the harness is given for a file: of one task its block, with paths beside the file written out."""
    if "group" in block:
        return block["group"]  # the harness finds it in its directory; by its path it takes the members for its name
    from lm_eval.tasks._yaml_loader import load_yaml

    spec: dict[str, Any] = load_yaml(path)
    local = spec.get("dataset_path") in _FORMATS

    def beside(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: beside(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [beside(inner) for inner in value]
        if not isinstance(value, str) or "://" in value:
            return value
        there = path.parent / value
        # The harness itself looks in the working directory.
        return str(there.absolute()) if there.exists() or (local and not Path(value).exists()) else value

    options = dict(spec.get("dataset_kwargs") or {})
    for name in options.keys() & {"data_files", "data_dir"}:
        options[name] = beside(options[name])
    return {**spec, "dataset_kwargs": options or None}


def _prepare(task: Any, shots: int | None) -> None:
    """Set a task's number of solved examples, as the harness does, and make its first prompt."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config("num_fewshot", shots or 0)
    for trait, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "shows pictures or sounds")):
        if getattr(task, trait, False):
            raise FtuneError(f"`{task.task_name}` {what}: such tasks are not run")
    if not task.get_config("process_results"):
        known = getattr(task, "_metric_fn_list", {})
        if missing := [name for name, function in known.items() if function is None]:
            raise FtuneError(f"`{task.task_name}`: the harness has no metric `{missing[0]}`")
    task.set_fewshot_seed(SEED)
    task.build_all_requests(limit=1)


def _stand_for(group: Any) -> set[str]:
    """The group where it has scores of its own, else its members."""
    if group.has_aggregation:
        return {group.name}
    return set().union(*(_stand_for(one) if hasattr(one, "child_names") else {one.task_name} for one in group))


def _unknown(name: str, known: Sequence[str]) -> FtuneError:
    if Path(name).exists():
        return FtuneError(f"{name} is no task file: its name must end in .yaml")
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
    return FtuneError(
        f"lm-evaluation-harness {version_of('lm_eval')} knows no task `{name}`",
        help=f"did you mean {' or '.join(f'`{one}`' for one in near)}?"
        if near
        else "`lm-eval ls tasks` lists them; a task of your own is named by its file, my_task.yaml",
    )


def _refused(name: str, error: Exception) -> FtuneError:
    """What to say of a task that cannot be made ready."""
    if isinstance(error, FtuneError):
        return FtuneError(f"task {error.message}", help=error.help)
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(part in type(one).__name__ for one in chain for part in _NETWORK):
        return FtuneError(
            f"the data of task `{name}` are not on this machine and cannot be had: {said}",
            help="run it once where there is a network (without HF_HUB_OFFLINE), or write a task file with local data",
        )
    if isinstance(error, StopIteration) or "dataset of size 0" in said:
        said = "its data have no items"
    elif isinstance(error, KeyError):
        said = f"its data have no split or column {error}"
    elif "must have valid or test docs" in said:
        said = "it has neither a `test_split` nor a `validation_split`"
    elif "larger than population" in said:
        said = "its data have fewer solved examples than --shots asks for"
    return FtuneError(f"task `{name}` cannot be run: {said}")
