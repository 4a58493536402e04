"""Which engine shares a model out among processes, and what it is told: asked for by the command line or the launch.

accelerate's launcher hands its configuration on in the environment. Everything in it is honoured or refused here,
before anything is loaded; nothing is passed over. No torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

from ftune.errors import FtuneError

if TYPE_CHECKING:
    from ftune.recipe.schema import Recipe

__all__ = [
    "DDP",
    "ENGINES",
    "EngineChoice",
    "choose_engine",
    "engine_for",
    "require_engine",
    "require_installed",
    "require_several",
]

EngineName = Literal["ddp", "fsdp2", "fsdp2-offload", "deepspeed-zero2", "deepspeed-zero3"]
ENGINES: tuple[str, ...] = get_args(EngineName)


@dataclass(frozen=True)
class EngineChoice:
    """An engine and its settings.

    Attributes:
        name: ``ddp`` (each process has the whole model; also of one process alone), ``fsdp2``, the same with each
            process's part in the host's memory, or DeepSpeed's ZeRO-2 or ZeRO-3.
        reshard_after_forward: fsdp2: whether a block's weights are dropped between its forward and its backward
            pass, and gathered twice an update.
    """

    name: EngineName = "ddp"
    reshard_after_forward: bool = True

    @property
    def offload(self) -> bool:
        """Whether the parts of each process lie in the host's memory."""
        return self.name == "fsdp2-offload"

    @property
    def zero_stage(self) -> int | None:
        """2 or 3 under DeepSpeed."""
        return int(self.name[-1]) if self.name.startswith("deepspeed") else None


DDP = EngineChoice()

# What accelerate's launcher sets for FSDP, and the values under which it asks for nothing that ftune would not do.
_FSDP: dict[str, tuple[tuple[str, ...], str]] = {
    "FSDP_VERSION": (("2",), "set fsdp_version: 2"),
    "FSDP_AUTO_WRAP_POLICY": (("TRANSFORMER_BASED_WRAP",), "ftune shards block by block: TRANSFORMER_BASED_WRAP"),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": (("", "None"), "leave it out: ftune finds the model's blocks"),
    "FSDP_MIN_NUM_PARAMS": (("", "0", "100000000", "None"), "leave it out: ftune shards block by block"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "false"), "true or false"),
    "FSDP_OFFLOAD_PARAMS": (("true", "false"), "true or false"),
    "FSDP_STATE_DICT_TYPE": (("FULL_STATE_DICT", "None", ""), "checkpoints are whole: FULL_STATE_DICT"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (("false",), "set it to false: every process reads the base model"),
    "FSDP_ACTIVATION_CHECKPOINTING": (("false",), "the recipe decides: training.gradient_checkpointing"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": (("false",), "set it to false"),
    "FSDP_IGNORED_MODULES": (("", "None"), "leave it out"),
    # Of version 1 alone; the launcher sets them to their defaults whatever the version.
    "FSDP_SHARDING_STRATEGY": (("", "1", "FULL_SHARD", "None"), "leave it out: fsdp_reshard_after_forward decides"),
    "FSDP_BACKWARD_PREFETCH": (("", "BACKWARD_PRE", "None", "NO_PREFETCH"), "leave it out"),
    "FSDP_FORWARD_PREFETCH": (("false",), "leave it out"),
    "FSDP_USE_ORIG_PARAMS": (("true", "false"), "leave it out"),
    "FSDP_SYNC_MODULE_STATES": (("true", "false"), "leave it out"),
}
"""Each variable: the values that are accepted, and what to do about others."""

# The same for DeepSpeed.
_DEEPSPEED: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": (("2", "3"), "2 or 3; ZeRO-1 saves nothing that 2 does not"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (("none",), "leave it out: configs/fsdp2-offload.yaml offloads"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (("none",), "leave it out: configs/fsdp2-offload.yaml offloads"),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": (("false",), "set it to false: every process reads the base model"),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": (("true", "false"), "leave it out: what is saved is whole"),
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": (("none", ""), "leave it out: ftune writes DeepSpeed's configuration"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": (("none", ""), "leave it out"),
    "ACCELERATE_GRADIENT_CLIPPING": (("none", ""), "leave it out: the recipe's training.max_grad_norm decides"),
}

_USES = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration (tensor, context, hybrid)",
}


def choose_engine(asked: str | None, environment: Mapping[str, str]) -> EngineChoice:
    """The engine that the command line asks for, else the launch configuration, else DDP.

    Args:
        asked: ``--engine``.
        environment: Where accelerate's launcher leaves its configuration.

    Raises:
        FtuneError: There is no such engine, the two disagree, or the launch asks for what ftune does not do.
    """
    launched = _launched(environment)
    if asked is None:
        return launched or EngineChoice()
    if asked == "deepspeed":
        asked = launched.name if launched is not None and launched.zero_stage else "deepspeed-zero2"
    if asked not in ENGINES:
        raise FtuneError(f"--engine {asked}: there is no such engine", help=f"one of {', '.join(ENGINES)}")
    if launched is not None and launched.name != asked:
        raise FtuneError(
            f"--engine {asked}, but the launch configuration asks for {launched.name}",
            help="leave out --engine, or launch with another configuration",
        )
    return launched or EngineChoice(name=cast(EngineName, asked))


def _launched(environment: Mapping[str, str]) -> EngineChoice | None:
    """What accelerate's launch configuration asks for; None where it leaves the engine open.

    Raises:
        FtuneError: Something that would be silently passed over.
    """

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() in ("true", "1", "yes", "on")

    for name, what in _USES.items():
        if on(name):
            raise FtuneError(
                f"the launch configuration asks for {what}, which ftune does not run",
                help="launch with one of configs/*.yaml",
            )
    wrong = []
    if environment.get("ACCELERATE_MIXED_PRECISION", "no").lower() not in ("no", ""):
        given = environment["ACCELERATE_MIXED_PRECISION"]
        wrong.append(f'mixed_precision: {given}: set it to "no"; the recipe\'s model.dtype decides')
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("no", ""):
        wrong.append("dynamo_backend: leave it out; ftune does not compile models")
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", ""):
        wrong.append("gradient_accumulation_steps: leave it out; the recipe's decides")
    if on("ACCELERATE_USE_FSDP"):
        wrong += _not_done({"FSDP_VERSION": "1", **environment}, _FSDP, "FSDP_")
    if on("ACCELERATE_USE_DEEPSPEED"):
        wrong += _not_done(environment, _DEEPSPEED, "ACCELERATE_DEEPSPEED_")
    if wrong:
        raise FtuneError(
            "the launch configuration asks for what ftune would not do:\n  " + "\n  ".join(wrong),
            help="mend it, or launch with one of configs/*.yaml",
        )
    if on("ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return EngineChoice(name="deepspeed-zero3" if stage == "3" else "deepspeed-zero2")
    if not on("ACCELERATE_USE_FSDP"):
        return None
    return EngineChoice(
        name="fsdp2-offload" if on("FSDP_OFFLOAD_PARAMS") else "fsdp2",
        reshard_after_forward=environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false",
    )


def engine_for(
    recipe: Recipe, asked: str | None, environment: Mapping[str, str], *, auto_batch: bool = False
) -> EngineChoice:
    """The engine of a run: one that is there, can run the recipe, and can do what ``--auto-batch`` needs.

    Args:
        recipe: What is to run.
        asked: ``--engine``.
        environment: Where accelerate's launcher leaves its configuration.
        auto_batch: Whether an update must be one that can be made anew.

    Raises:
        FtuneError: As ``choose_engine`` and ``require_engine`` do; or its library is missing, or ``auto_batch`` cannot
            be.
    """
    choice = choose_engine(asked, environment)
    require_engine(recipe, choice)
    require_installed(choice)
    if auto_batch and recipe.method.updates_in_backward:
        raise FtuneError(
            "--auto-batch with a method that updates in the backward pass: an update cannot be made anew",
            help="method.per_layer: false, or leave out --auto-batch",
        )
    if auto_batch and choice.name != "ddp":
        raise FtuneError(
            f"--auto-batch under {choice.name}: its forward and backward passes exchange weights, and the other "
            "processes would wait in theirs for the one out of memory",
            help="--engine ddp, or leave it out and lower training.micro_batch_size or micro_batch_tokens",
        )
    return choice


def require_several(choice: EngineChoice, processes: int) -> None:
    """Hold that there are processes among which an engine can share something out.

    Raises:
        FtuneError: There is one.
    """
    if choice.name != "ddp" and processes == 1:
        raise FtuneError(
            f"--engine {choice.name} in one process: there is nothing to share out",
            help="--num-processes 2 makes it two",
        )


def require_installed(choice: EngineChoice) -> None:
    """Hold that the engine's library is there.

    Raises:
        FtuneError: It is not.
    """
    if choice.zero_stage and importlib.util.find_spec("deepspeed") is None:
        raise FtuneError(
            f"engine `{choice.name}` needs DeepSpeed, which is not installed",
            help="pip install 'ftune[deepspeed]', or use --engine fsdp2, which needs nothing more",
        )


def _not_done(
    environment: Mapping[str, str], known: Mapping[str, tuple[tuple[str, ...], str]], prefix: str
) -> list[str]:
    """Variables whose values ftune would not honour, by accelerate's name of the field; unknown ones too."""
    wrong = []
    for name, (accepted, remedy) in known.items():
        value = environment.get(name)
        if value is not None and value.lower() not in [word.lower() for word in accepted]:
            wrong.append(f"{_field(name)}: {value}: {remedy}")
    unknown = sorted(name for name in environment if name.startswith(prefix) and name not in known)
    return wrong + [f"{_field(name)}: not known to ftune" for name in unknown]


def _field(variable: str) -> str:
    return variable.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower()


def require_engine(recipe: Recipe, choice: EngineChoice) -> None:
    """Hold that this recipe can run under this engine.

    Args:
        recipe: What is to run.
        choice: The engine.

    Raises:
        FtuneError: Names the field and the way out; all of them.
    """
    problems = list(recipe.method.engine_problems(recipe, choice.name))
    if problems:
        lines = [f"{'.'.join(map(str, problem.loc))}: {problem.message}" for problem in problems]
        raise FtuneError(
            f"engine `{choice.name}` cannot run this recipe:\n  " + "\n  ".join(lines),
            help="; ".join(problem.help for problem in problems if problem.help),
        )
