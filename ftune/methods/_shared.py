"""Helpers that several methods call: find targets, attach and save PEFT adapters, merge, count.

Every function here takes what it needs as arguments; none knows which method calls it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftune.errors import ModelError, RunFailed
from ftune.expressions import compiled, matching
from ftune.methods._language import in_language_model, language_prefixes, reads_weight
from ftune.methods.base import Context, Linear, Method, Problem
from ftune.methods.quantization import Quantization

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from ftune.methods.base import ModelShape

Targets = str | tuple[str, ...]

# Projections that read the same tensor, so that autograd keeps it once for all of them.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


# --- targets -----------------------------------------------------------------------------------------------


def list_linears(model: nn.Module) -> tuple[Linear, ...]:
    """Every linear projection of the language model but its output head, in order.

    Works on the meta device too. ``transformers`` keeps GPT-2's weights as ``Conv1D``, transposed.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head, prefixes = cast(Any, model).get_output_embeddings(), language_prefixes(model)
    found = []
    for name, module in model.named_modules():
        if module is head or not in_language_model(name, prefixes):
            continue
        parent, _, leaf = name.rpartition(".")
        adaptable = not reads_weight(cast(Any, type(model.get_submodule(parent))), leaf)
        if isinstance(module, torch.nn.Linear):
            plain = type(module) is torch.nn.Linear or is_4bit(module)
            found.append(
                Linear(
                    name,
                    module.in_features,
                    module.out_features,
                    adaptable=adaptable,
                    quantizable=adaptable and plain,
                )
            )
        elif isinstance(module, Conv1D):
            found.append(Linear(name, module.nx, module.nf, True, adaptable, quantizable=False))
    return tuple(found)


def different(linears: Sequence[Linear]) -> int:
    """How many shapes some projections have."""
    return len({(linear.in_features, linear.out_features) for linear in linears})


def match_targets(
    linears: Sequence[Linear], targets: Targets, field: str = "target_modules", *, beside: bool = True
) -> list[Linear]:
    """The projections that a field of the recipe names, with PEFT's rules.

    A list matches whole names or their last components; a string other than ``all-linear`` is a regular
    expression over the whole name.

    Args:
        linears: Of the model.
        targets: As the recipe has them.
        field: Its name, for messages.
        beside: Whether something is put beside them: ``all-linear`` leaves out what that has no effect on.

    Raises:
        ModelError: An entry matches no linear projection inside the blocks, or one past which the model reads the
            weight; or an expression takes too long.
    """
    if targets == "all-linear":
        return [linear for linear in linears if linear.adaptable or not beside]
    matched = _match(linears, targets, field)
    past = [linear.name for linear in matched if not linear.adaptable and beside]
    if past:
        raise ModelError(
            f"{field}: the model reads the weight of `{past[0]}` itself, so an adapter beside it would have no effect",
            help="leave it out; `all-linear` does",
        )
    return matched


def _match(linears: Sequence[Linear], targets: Targets, field: str) -> list[Linear]:
    if isinstance(targets, str):
        try:
            names = set(matching(targets, (linear.name for linear in linears)))
        except ValueError as error:
            raise ModelError(f"{field}: {targets[:80]!r}: {error}", help="give a list of module names") from error
        matched = [linear for linear in linears if linear.name in names]
        if not matched:
            raise ModelError(
                f"{field}: {targets!r} matches no linear layer",
                help=f"an expression has to match a whole name, as `{linears[0].name}`: begin it with `.*`, or give a "
                f"list of names; {_available(linears)}",
            )
        return matched

    def fits(name: str, target: str) -> bool:
        return name == target or name.endswith("." + target)

    for target in targets:
        if not any(fits(linear.name, target) for linear in linears):
            raise ModelError(f"{field}: `{target}` is no linear layer of this model", help=_available(linears))
    return [linear for linear in linears if any(fits(linear.name, target) for target in targets)]


def _available(linears: Sequence[Linear]) -> str:
    leaves = sorted({linear.name.rsplit(".", 1)[-1] for linear in linears})
    return "the model has " + ", ".join(leaves)


def target_problems(targets: Targets, embeddings: str | None = None) -> Iterator[Problem]:
    """Yield what is wrong with ``target_modules`` before any model is known.

    Args:
        targets: As the recipe has them.
        embeddings: Why embeddings and the head are no targets; None: a low-rank update of them cannot be merged.
    """
    loc = ("method", "target_modules")
    if isinstance(targets, str):
        if targets in ("all_linear", "all"):
            yield Problem(loc, f"`{targets}` is no module name", "did you mean `all-linear`?")
            return
        try:
            compiled(targets)
        except ValueError as error:
            yield Problem(loc, f"not a regular expression: {error}", "or give a list of module names")
        return
    if not targets:
        yield Problem(loc, "no target at all: the method would train nothing", "use `all-linear`")
    for index, target in enumerate(targets):
        if target in ("embed_tokens", "wte", "lm_head"):
            yield Problem(
                (*loc, index),
                embeddings
                or f"`{target}` is an embedding or the output head; a low-rank update of tied weights cannot be merged",
                "target the linear layers inside the blocks",
            )


def not_quantizable(model: nn.Module) -> list[str]:
    """Names of the linear layers that stay as they are where a base is quantized; empty where only the head does."""
    import torch

    head, linears = cast(Any, model).get_output_embeddings(), list_linears(model)
    kept = {linear.name for linear in linears if linear.quantizable}
    others = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    left = [name for name in others if name not in kept]
    return [] if all(others[name] is head for name in left) else left


# --- attaching ---------------------------------------------------------------------------------------------


def peft_settings(model: nn.Module, targets: Targets, context: Context) -> dict[str, Any]:
    """Keyword arguments that every PEFT configuration over linear layers shares.

    Raises:
        ModelError: A target matches nothing.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    matched = {linear.name for linear in match_targets(list_linears(model), targets)}
    head = cast(Any, model).get_output_embeddings()
    linear = {n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head}
    if targets == "all-linear":
        found = linear
    elif isinstance(targets, tuple):
        found = {name for name in linear if any(name == target or name.endswith(f".{target}") for target in targets)}
    else:
        # PEFT would match the expression against everything, the output head and whole blocks included.
        found = set()
    if found != matched:
        targets = tuple(sorted(matched))
    kinds = {isinstance(module, Conv1D) for name, module in model.named_modules() if name in matched}
    return {
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "fan_in_fan_out": True in kinds,
        "task_type": "CAUSAL_LM",
    }


_only_asking: ContextVar[bool] = ContextVar("_only_asking", default=False)


class _Asked(Exception):
    """Carries the configuration that ``attach`` was called with."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


def asked_for(method: Method, base: nn.Module, context: Context) -> Any:
    """The PEFT configuration that a method would attach to a base, without attaching it.

    Raises:
        ModelError: As the method's ``adapt`` does.
    """
    token = _only_asking.set(True)
    try:
        # AdaLoRA refuses a run too short for its phases; how long it was is not asked here.
        method.adapt(base, dataclasses.replace(context, total_steps=10**9))
    except _Asked as asked:
        return asked.config
    finally:
        _only_asking.reset(token)
    raise AssertionError(f"{type(method).__name__}.adapt does not attach by PEFT")


def attach(model: nn.Module, config: Any, context: Context) -> nn.Module:
    """Wrap a model with PEFT: the base frozen, the adapter in fp32, its start drawn from the seed alone."""
    import torch
    from peft import get_peft_model

    if _only_asking.get():
        raise _Asked(config)
    # PEFT draws from the global generator; the loop reseeds it before every forward pass.
    torch.manual_seed(context.seed)
    wrapped = cast("nn.Module", get_peft_model(cast(Any, model), config))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # Under autocast the adapter's products run in the compute dtype anyway; casting its input to fp32 first
    # would only save a second, larger copy of it for the backward pass.
    return cast_inputs(wrapped, enabled=context.dtype == torch.float32)


def cast_inputs(model: nn.Module, *, enabled: bool) -> nn.Module:
    """Whether PEFT layers cast their input to the adapter's dtype."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            cast(Any, module).cast_input_dtype_enabled = enabled
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's tensors, with the names PEFT saves."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(cast(Any, model), save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def require_same_initial(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Hold that a resumed PiSSA or OLoRA run took the same matrices out of its base.

    Raises:
        RunFailed: The decomposition came out differently, so the frozen residual is another one.
    """
    import torch

    mine: dict[str, Tensor] = getattr(model, "_ftune_initial", {})
    stored = {key.removeprefix("initial."): value for key, value in state.items()}
    if mine.keys() != stored.keys() or any(not torch.equal(mine[key], stored[key]) for key in mine):
        raise RunFailed(
            "the decomposition of the base weights differs from the one this run started with",
            help="resume on the machine and with the library versions that began the run",
        )


# --- saving and loading ------------------------------------------------------------------------------------


def save_peft(
    model: nn.Module,
    out: Path,
    context: Context,
    initial: dict[str, Tensor] | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Save an adapter in PEFT's format, naming the base model without a local path.

    Args:
        model: The wrapped model.
        out: An existing, empty directory.
        context: Gives the public name and revision of the base.
        initial: The adapter at the start, when it was taken out of the base weights: the saved adapter is then
            the difference, of rank 2r, and fits the untouched base.
        settings: What the saved configuration says instead, where the saved tensors are other ones than trained.
    """
    from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
    from safetensors.torch import save_file

    config = copy.deepcopy(cast(Any, model).peft_config["default"])
    config.base_model_name_or_path = context.base_name or None
    config.revision = context.revision
    config.inference_mode = True
    state = adapter_state(model)
    if initial is not None:
        state = _difference(state, initial, config)
    save_file(state, out / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    # PEFT keeps sets in its configuration: sorted, two runs of one recipe write the same bytes.
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    plain |= settings or {}
    (out / CONFIG_NAME).write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")


def _difference(state: dict[str, Tensor], initial: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The adapter of rank 2r that adds ``scale (B A - B0 A0)``; changes the configuration to match."""
    import torch

    for key, value in difference_settings(config).items():
        setattr(config, key, value)
    return {
        name: torch.cat([tensor, initial[name]], dim=0)
        if "lora_A" in name
        else torch.cat([tensor, -initial[name]], dim=1)
        for name, tensor in state.items()
    }


def difference_settings(config: Any) -> dict[str, Any]:
    """How the configuration of ``scale (B A - B0 A0)`` differs from that of ``scale B A``."""
    # rsLoRA divides by the root of the rank, which grows by the root of two.
    alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    return {"r": 2 * config.r, "lora_alpha": alpha, "init_lora_weights": True}


def save_as_lora(factors: dict[str, tuple[Tensor, Tensor]], base: nn.Module, out: Path, context: Context) -> int:
    """Save low-rank updates as a plain LoRA adapter of scale 1; returns its rank.

    Every update is padded with zeros to the largest rank among them: inference engines know one rank an adapter.

    Args:
        factors: For each projection, by name, ``A`` (r, in) and ``B`` (out, r).
        base: The model that the names belong to; afterwards it is as it was.
        out: An existing, empty directory.
        context: Names the base model.
    """
    import torch
    from peft import LoraConfig

    rank = max(1, *(a.shape[0] for a, _ in factors.values()))
    leaves = {name.rsplit(".", 1)[-1] for name in factors}
    fitting = {linear.name for linear in match_targets(list_linears(base), tuple(sorted(leaves)))}
    targets = tuple(sorted(leaves if fitting == set(factors) else factors))
    config = LoraConfig(r=rank, lora_alpha=rank, **peft_settings(base, targets, context))
    wrapped = attach(base, config, context)
    with torch.no_grad():
        for name, (a, b) in factors.items():
            layer = cast(Any, wrapped.get_submodule(f"base_model.model.{name}"))
            for weight, given in ((layer.lora_A["default"].weight, a), (layer.lora_B["default"].weight, b)):
                weight.zero_()
                weight[: given.shape[0], : given.shape[1]] = given
    save_peft(wrapped, out, context)
    cast(Any, wrapped).unload()
    return rank


def load_peft(base: nn.Module, directory: Path) -> nn.Module:
    """Attach an adapter saved by ``save_peft``; nothing requires grad.

    Raises:
        ModelError: There is no safetensors file: PEFT would take a pickle in its place, or ask the hub.
    """
    from peft import PeftModel
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    from ftune.methods._agreement import require_tensors

    weights = directory / SAFETENSORS_WEIGHTS_NAME
    if not weights.is_file():
        raise ModelError(
            f"{directory} has no {SAFETENSORS_WEIGHTS_NAME}, and ftune reads no pickle",
            help="train the run again, or restore the file",
        )
    wrapped = cast("nn.Module", PeftModel.from_pretrained(cast(Any, base), str(directory)))
    require_tensors(wrapped, weights)
    return wrapped.requires_grad_(False)


def disable_adapter(model: nn.Module) -> AbstractContextManager[Any]:
    """PEFT's context in which the base computes alone."""
    return cast("AbstractContextManager[Any]", cast(Any, model).disable_adapter())


# --- merging -----------------------------------------------------------------------------------------------


def merge_peft(model: nn.Module) -> nn.Module:
    """Merge a PEFT adapter in fp32 into the weights it was trained against.

    4-bit layers are dequantized first, so that the merged model is the one that was trained: merging onto the
    original weights gives another model (peft#2105), merging in 4 bits rounds the update away.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    peft_model = cast(Any, model)
    if any(is_4bit(module) for module in model.modules()):
        state, config = adapter_state(model), copy.deepcopy(peft_model.peft_config["default"])
        plain = dequantize(peft_model.unload())
        config.base_model_name_or_path = None
        peft_model = get_peft_model(cast(Any, plain), config)
        set_peft_model_state_dict(peft_model, state)
    merged = peft_model.float().merge_and_unload(safe_merge=True)
    return cast("nn.Module", merged)


def merge_factors(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Take a PEFT adapter off and add its low-rank updates, in fp32, to the weights it was trained against.

    Args:
        model: The wrapped model; its base is changed in place, 4-bit layers dequantized.
        factors: For each projection, by name, ``A`` (r, in) and ``B`` (out, r), fp32.
    """
    from transformers.pytorch_utils import Conv1D

    plain = cast("nn.Module", cast(Any, model).unload())
    if any(is_4bit(module) for module in plain.modules()):
        plain = dequantize(plain)
    plain = plain.float()
    for name, (a, b) in factors.items():
        layer = cast(Any, plain.get_submodule(name))
        update = b @ a
        layer.weight.data += update.T if isinstance(layer, Conv1D) else update
    return plain


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' 4-bit linear layer (PEFT's wrapper around one is not)."""
    # By name: importing bitsandbytes to ask would cost seconds in runs that never use it.
    return any(
        cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__
    )


def dequantized(weight: Any) -> Tensor:
    """What a quantized ``Params4bit`` multiplies with, in fp32."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    # The exact product of codes and scales; by itself bitsandbytes rounds it to the dtype before quantization.
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return cast("Tensor", dequantize_4bit(weight.data, state))


def dequantize(model: nn.Module) -> nn.Module:
    """Replace every 4-bit linear layer by a plain one that holds exactly what it multiplied with, in fp32."""
    import torch

    for name, module in list(model.named_modules()):
        if not is_4bit(module):
            continue
        layer = cast(Any, module)
        plain = torch.nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device=layer.weight.device
        )
        plain.weight.data = dequantized(layer.weight)
        if layer.bias is not None:
            plain.bias.data = layer.bias.data.float()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    whole = cast(Any, model)
    for attribute in ("is_loaded_in_4bit", "is_quantized"):
        if hasattr(whole, attribute):
            setattr(whole, attribute, False)
    whole.hf_quantizer = None
    whole.quantization_method = None
    if getattr(whole.config, "quantization_config", None) is not None:
        del whole.config.quantization_config
    return model


# --- vitals ------------------------------------------------------------------------------------------------


def update_vitals(model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """How many layers carry an update, and the least and mean norm of B, which starts at zero.

    Left out, and counted, are layers that never got a gradient but zero: the base multiplies by zero what comes of
    them.
    """
    found = {p: float(p.detach().float().norm()) for name, p in model.named_parameters() if "lora_B" in name}
    states = {p: optimizer.state.get(p) for p in found} if optimizer.state else {}
    idle = [p for p, state in states.items() if found[p] == 0 and (not state or never_pulled(state))]
    norms = [norm for p, norm in found.items() if not any(p is other for other in idle)]
    return ({"idle_layers": float(len(idle))} if idle and norms else {}) | {
        "adapted_layers": float(len(norms)),
        "lora_b_norm_mean": sum(norms) / max(1, len(norms)),
        "lora_b_norm_min": min(norms, default=0.0),
    }


def never_pulled(state: dict[str, Any]) -> bool:
    """Whether an optimizer's state of a parameter has seen no gradient but zero."""
    first = state.get("exp_avg", state.get("state1"))
    return first is not None and first.is_floating_point() and not bool(first.any())


def dora_layers(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each DoRA magnitude, (out,), with the row norms of its base weight in fp32."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    from ftune.ops.sharded import whole

    for module in model.modules():
        magnitudes = getattr(module, "lora_magnitude_vector", None)
        if magnitudes:
            layer = cast(Any, module)
            weight = whole(dequantize_module_weight(layer.get_base_layer())).detach().float()
            yield (
                magnitudes["default"].weight,
                torch.linalg.norm(weight.T if layer.fan_in_fan_out else weight, dim=1),
            )


def magnitude_vitals(model: nn.Module) -> dict[str, float]:
    """How far DoRA's magnitudes moved from the row norms of the base weights, as a mean share of them."""
    shares = [
        float(((trained.detach().float() - norms).abs() / norms.clamp_min(1e-12)).mean())
        for trained, norms in dora_layers(model)
    ]
    return {"magnitude_change_mean": sum(shares) / max(1, len(shares))}


def quantization_vitals(model: nn.Module) -> dict[str, float]:
    """How many layers are 4-bit, and the bytes of their packed weights; empty when none is."""
    layers = [module for module in model.modules() if is_4bit(module)]
    if not layers:
        return {}
    packed = sum(cast(Any, layer).weight.numel() * cast(Any, layer).weight.element_size() for layer in layers)
    return {"quantized_layers": float(len(layers)), "quantized_bytes": float(packed)}


def quantization_failure(quantization: Quantization | None, vitals: dict[str, float]) -> str | None:
    """Why the 4-bit base is none, or None."""
    if quantization is not None and not vitals.get("quantized_layers"):
        return "no projection of the base is 4-bit, though the recipe asks for it"
    return None


def quantization_line(vitals: dict[str, float]) -> str:
    """The 4-bit base for people, to be put behind another line; empty when nothing is quantized."""
    if not vitals.get("quantized_layers"):
        return ""
    return f"; {vitals['quantized_layers']:.0f} layers in 4 bits ({vitals['quantized_bytes'] / 2**20:,.3g} MiB)"


# --- arithmetic --------------------------------------------------------------------------------------------


def makes_input_again(shape: ModelShape, linear: Linear) -> bool:
    """Whether a layer's input is made again in the backward pass, of what a norm or a gate keeps anyway."""
    leaf = linear.name.rpartition(".")[2]
    if leaf in ("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj"):
        return bool(shape.extra["pre_norm"])
    return leaf == "down_proj" and bool(shape.extra["lean_gate"])


def keeps_output(shape: ModelShape, linear: Linear) -> bool:
    """Whether what reads a layer's output keeps it as it is: attention its values, a gate its factors."""
    leaf = linear.name.rpartition(".")[2]
    return leaf == "v_proj" or (leaf in ("gate_proj", "up_proj") and bool(shape.extra["lean_gate"]))


def lean_saved_bytes(shape: ModelShape, targets: Sequence[Linear], rank: int, dtype_bytes: int) -> int:
    """Bytes a token that lean low-rank layers keep: ``xA``, and the inputs that no norm or gate makes again."""
    kept = [linear for linear in targets if not makes_input_again(shape, linear)]
    names = tuple(linear.name for linear in kept)
    inputs = low_rank_saved_bytes(kept, names, 0, dtype_bytes) if kept else 0
    return inputs + rank * len(targets) * dtype_bytes


def lean_saved_copies(targets: Sequence[Linear], rank: int, dtype_bytes: int) -> int:
    """Bytes of the copies of A, and in 16 bits of B, that ``ftune.ops.linear`` keeps for the backward pass.

    Layers of transposed weights are PEFT's own, which keeps none.
    """
    lean = [linear for linear in targets if not linear.transposed]
    return dtype_bytes * rank * sum(t.in_features + (t.out_features if dtype_bytes < 4 else 0) for t in lean)


def low_rank_saved_bytes(linears: Sequence[Linear], targets: Targets, rank: int, dtype_bytes: int) -> int:
    """Bytes a token that the low-rank products keep for the backward pass: each distinct input, and ``xA``."""
    elements = 0
    seen: set[tuple[str, tuple[str, ...]]] = set()
    for linear in match_targets(linears, targets):
        parent, _, leaf = linear.name.rpartition(".")
        group = next((names for names in _SAME_INPUT if leaf in names), (leaf,))
        elements += rank
        # The input of the output projection is attention's result, which attention keeps anyway.
        if leaf not in ("o_proj", "out_proj") and (parent, group) not in seen:
            seen.add((parent, group))
            elements += linear.in_features
    return elements * dtype_bytes
