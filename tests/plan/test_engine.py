"""Which engine runs, what the launch configuration says, and the table in docs/distributed.md."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from ftune.errors import FtuneError
from ftune.methods import METHODS
from ftune.plan.engine import ENGINES, EngineChoice, choose_engine, require_engine, require_installed

ROOT = Path(__file__).parents[2]
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def environment(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` puts into the environment of each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(config), "-m", "ftune"])
    )
    return prepare_multi_gpu_env(args)


def test_without_a_word_it_is_ddp() -> None:
    assert choose_engine(None, {}) == EngineChoice("ddp")


def test_the_launch_configuration_chooses() -> None:
    assert choose_engine(None, FSDP) == EngineChoice("fsdp2")
    kept = choose_engine("fsdp2", FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"})
    assert kept == EngineChoice("fsdp2", reshard_after_forward=False)
    assert choose_engine(None, FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}) == EngineChoice("fsdp2-offload")
    for asked in (None, "deepspeed", "deepspeed-zero3"):
        assert choose_engine(asked, ZERO) == EngineChoice("deepspeed-zero3")
    assert choose_engine("deepspeed", {}) == EngineChoice("deepspeed-zero2")
    assert [choose_engine(name, {}).zero_stage for name in ENGINES] == [None, None, None, 2, 3]


@pytest.mark.parametrize(
    ("asked", "given", "said"),
    [
        ("zero", {}, "no such engine"),
        ("deepspeed-zero2", ZERO, "asks for deepspeed-zero3"),
        ("fsdp2", ZERO, "asks for deepspeed-zero3"),
        (None, ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "zero_stage: 1: 2 or 3"),
        (None, ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer_device: cpu"),
        (None, ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "config_file: ds.json"),
        (None, ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "training.max_grad_norm decides"),
        (None, ZERO | {"ACCELERATE_DEEPSPEED_NEW_THING": "1"}, "new_thing: not known"),
        (None, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron"),
        (None, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "model.dtype"),
        (None, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: leave it out"),
        ("ddp", FSDP, "asks for fsdp2"),
        (None, FSDP | {"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        (None, {"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        (None, FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing"),
        (None, FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "FULL_STATE_DICT"),
        ("fsdp2", FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "asks for fsdp2-offload"),
        (None, FSDP | {"FSDP_NEW_THING": "1"}, "fsdp_new_thing"),
    ],
)
def test_what_it_would_not_do_is_refused(asked: str | None, given: dict[str, str], said: str) -> None:
    with pytest.raises(FtuneError, match=said):
        choose_engine(asked, given)


def test_an_engine_whose_library_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FtuneError, match="needs DeepSpeed, which is not installed") as refused:
        require_installed(EngineChoice("deepspeed-zero2"))
    assert "ftune[deepspeed]" in str(refused.value.help)
    require_installed(EngineChoice("fsdp2"))


def test_four_bits_are_not_offloaded(tmp_path: Path) -> None:
    with pytest.raises(FtuneError, match="method.quantization: 4-bit weights"):
        require_engine(tiny.recipe(tmp_path, "qlora").recipe, EngineChoice("fsdp2-offload"))  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["deepspeed-zero2", "deepspeed-zero3"])
def test_deepspeed_updates_by_plain_adamw_alone(engine: str, tmp_path: Path) -> None:
    given = tiny.recipe(tmp_path, optimizer={"name": "paged_adamw_8bit"}).recipe
    with pytest.raises(FtuneError, match="optimizer.name: `paged_adamw_8bit` is bitsandbytes' own"):
        require_engine(given, EngineChoice(engine))  # type: ignore[arg-type]


def test_the_shipped_configuration_asks_for_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ROOT / "configs" / "fsdp2.yaml"
    assert yaml.safe_load(config.read_text())["fsdp_config"]["fsdp_version"] == 2
    # Another test's settings must not decide.
    for name in list(__import__("os").environ):
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.delenv(name)
    assert choose_engine(None, environment(config)) == EngineChoice("fsdp2")


def test_the_table_says_what_the_code_refuses(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from make_engine_table import BEGIN, END, cell, recipes
    finally:
        sys.path.pop(0)
    from ftune.recipe import load_checked

    text = (ROOT / "docs" / "distributed.md").read_text().split(BEGIN)[1].split(END)[0]
    header, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.strip().splitlines()]
    made = recipes(tmp_path)
    assert [row[0] for row in rows] == list(made)
    assert set(METHODS) <= set(made)
    for name, *cells in rows:
        for engine, written in zip(header[1:], cells, strict=True):
            assert written == cell(_verdict(load_checked(made[name])[0].recipe, engine)), (name, engine)


def _verdict(recipe: object, engine: str) -> str:
    """What planning says for two processes."""
    from ftune.plan.base_model import configured
    from ftune.plan.shapes import read_shape

    try:
        choice = choose_engine(engine, {})
        require_engine(recipe, choice)  # type: ignore[arg-type]
        method = recipe.method  # type: ignore[attr-defined]
        shape = read_shape(configured(recipe.model, method))  # type: ignore[attr-defined]
        for problem in method.refusals(shape, tiny.context(world_size=2, max_length=256)):
            raise FtuneError(problem.message)
    except FtuneError as error:
        return f"refused: {error}"
    return "works"
