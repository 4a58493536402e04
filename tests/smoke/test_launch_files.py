"""The launch files in configs/, as accelerate reads them and as it would start them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from ftune.plan.engine import choose_engine

CONFIGS = Path(__file__).parents[2] / "configs"
# engine: what ftune makes of what accelerate hands on; None: it is left open, and so DDP.
FILES: dict[str, dict[str, Any]] = {
    "one-device": {"launcher": "simple_launcher", "processes": 1, "machines": 1, "cpu": False},
    "ddp": {"launcher": "multi_gpu_launcher", "processes": 2, "machines": 1, "cpu": False},
    "ddp-cpu": {"launcher": "multi_gpu_launcher", "processes": 2, "machines": 1, "cpu": True},
    "multi-node": {"launcher": "multi_gpu_launcher", "processes": 16, "machines": 2, "cpu": False},
    "fsdp2": {"launcher": "multi_gpu_launcher", "processes": 2, "machines": 1, "cpu": False, "engine": "fsdp2"},
    "fsdp2-offload": {
        "launcher": "multi_gpu_launcher",
        "processes": 2,
        "machines": 1,
        "cpu": False,
        "engine": "fsdp2-offload",
    },
    **{
        f"deepspeed-zero{stage}": {
            "launcher": "deepspeed_launcher",
            "processes": 2,
            "machines": 1,
            "cpu": False,
            "engine": f"deepspeed-zero{stage}",
        }
        for stage in (2, 3)
    },
}


def test_every_file_is_under_test() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_accelerate_starts_what_the_file_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, path = FILES[name], CONFIGS / f"{name}.yaml"
    config: Any = load_config_from_file(str(path))
    assert config.mixed_precision == "no", "the recipe decides"
    # Nothing in the file that accelerate would not read.
    assert yaml.safe_load(path.read_text()).keys() <= config.to_dict().keys()
    started: list[tuple[str, Any]] = []
    for launcher in [entry for entry in dir(launch) if entry.endswith("_launcher")]:
        monkeypatch.setattr(launch, launcher, lambda args, launcher=launcher: started.append((launcher, args)))
    arguments = ["--config_file", str(path), "-m", "ftune", "train", "RECIPE"]
    launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    ((launcher, args),) = started
    assert launcher == expected["launcher"]
    assert (args.num_processes, args.num_machines) == (expected["processes"], expected["machines"])
    if launcher == "simple_launcher":
        command, environment = prepare_simple_launcher_cmd_env(args)
        assert command[1:] == ["-m", "ftune", "train", "RECIPE"]
    elif launcher == "deepspeed_launcher":
        command, environment = prepare_deepspeed_cmd_env(args)
        assert command is None, "torchrun starts it"
        assert str(args.nproc_per_node) == str(expected["processes"])
    else:
        environment = prepare_multi_gpu_env(args)
        assert str(args.nproc_per_node) == str(expected["processes"] // expected["machines"])
    if launcher != "simple_launcher":
        assert (args.module, args.training_script, args.training_script_args) == (True, "ftune", ["train", "RECIPE"])
    assert config.use_cpu is expected["cpu"]
    engine = expected.get("engine")
    assert {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & environment.keys() == (
        {f"ACCELERATE_USE_{'FSDP' if engine.startswith('fsdp2') else 'DEEPSPEED'}"} if engine else set()
    )
    assert choose_engine(None, environment).name == (engine or "ddp")


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_how_it_is_launched(name: str) -> None:
    head = "".join(line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines(True) if line.startswith("#"))
    assert f"accelerate launch --config_file configs/{name}.yaml" in head
    assert "-m ftune train RECIPE" in head


def test_the_page_on_launching_names_every_file() -> None:
    page = (CONFIGS.parent / "docs/distributed.md").read_text(encoding="utf-8")
    for name in FILES:
        assert f"configs/{name}.yaml" in page
