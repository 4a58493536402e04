"""The base model: its configuration, tokenizer and weights, from a hub, a directory or a GGUF file."""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from ftune.errors import DataError, ModelError
from ftune.methods import Method
from ftune.methods.targets import not_quantizable
from ftune.models.whole import quiet
from ftune.plan.attention import settle_attention
from ftune.plan.bounds import require_possible_sizes
from ftune.plan.causal import refuse_other_kinds, require_causal, sees_later_tokens, small_sees_later_tokens
from ftune.plan.gguf import kept_config, kept_tokenizer, kept_weights
from ftune.plan.missing import check_files, require_whole
from ftune.plan.quantized import (
    adopt_4bit,
    dense_of_8bit,
    forget_quantization,
    keep_packed,
    leave_file,
    quantize,
    stored_bits,
)
from ftune.plan.shapes import auto_class, build_on_meta
from ftune.plan.unreadable import explained
from ftune.plan.weights import load_cast, safetensors_files
from ftune.recipe.locate import Located, locate_model
from ftune.recipe.no_model import SAFETENSORS_HELP, other_weights
from ftune.recipe.schema import ModelSpec
from ftune.regular import read_regular
from ftune.scrub import scrub

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_TEMPLATE_BYTES = 1_000_000

__all__ = [
    "check_causal",
    "check_weights",
    "choose_device",
    "configured",
    "gguf_path",
    "load_base",
    "load_config",
    "load_tokenizer",
    "read_template",
]


def choose_device() -> torch.device:
    """CUDA where torch sees it, else the CPU. Apple's MPS is not chosen: nothing here was tried on it."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _source(spec: ModelSpec, located: Located) -> dict[str, Any]:
    """Keyword arguments of every ``from_pretrained`` that say where to read."""
    if spec.trust_remote_code:
        _shout(spec.id)
    source: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if located.revision:
        source["revision"] = located.revision
    if located.gguf_file:
        source["gguf_file"] = located.gguf_file
    return source


@functools.cache
def _shout(name: str) -> None:
    """Say once that a model's code is run: here, so that no command does it in silence."""
    print(f"WARNING: trust_remote_code is ON: running Python code that comes with {scrub(name)}", file=sys.stderr)


def gguf_path(located: Located) -> Path:
    """The GGUF file, from the hub's cache where it is not a local one."""
    from transformers.utils import cached_file

    assert located.gguf_file is not None
    if located.kind == "gguf":
        return Path(located.path_or_id) / located.gguf_file
    return Path(cast(str, cached_file(located.path_or_id, located.gguf_file, revision=located.revision)))


def load_config(spec: ModelSpec) -> Any:
    """The model's transformers configuration, a fresh copy at every call; no weights are read."""
    return copy.deepcopy(_read_config(spec, _state(spec)))


def configured(spec: ModelSpec, method: Method) -> Any:
    """The model's configuration as the method changes it before the model is built."""
    config = load_config(spec)
    method.configure(config)
    return config


@functools.cache
def _read_config(spec: ModelSpec, state: tuple[int, ...]) -> Any:
    """Read once a process, unless the file changes: a GGUF file's header alone takes seconds."""
    from transformers import AutoConfig

    located = locate_model(spec)

    def read() -> Any:
        return AutoConfig.from_pretrained(located.path_or_id, **_source(spec, located))

    with explained(spec, "configuration"):
        config = kept_config(gguf_path(located), read) if located.gguf_file else read()
    require_possible_sizes(config, spec.id)
    refuse_other_kinds(config, spec.id)
    return config


def check_causal(spec: ModelSpec) -> None:
    """Hold that no token sees a later one, as a small model of the same configuration tells, where one can be made.

    Raises:
        ModelError: One does.
    """
    require_causal(_small_leaks(spec, _state(spec)), spec.id)


@functools.cache
def _small_leaks(spec: ModelSpec, state: tuple[int, ...]) -> bool | None:
    return None if spec.trust_remote_code else small_sees_later_tokens(_read_config(spec, state))


def _state(spec: ModelSpec) -> tuple[int, ...]:
    """Tells a local configuration from another under the same name: a notebook writes a model anew, or moves."""
    path = Path(spec.id).expanduser()
    try:
        found = (path / "config.json" if path.is_dir() else path).stat()
    except OSError:  # on the hub, in a package, or a directory of GGUF files
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def load_tokenizer(spec: ModelSpec, chat_template: str | None = None) -> Any:
    """The model's fast tokenizer, with a padding token.

    Args:
        spec: The recipe's model block.
        chat_template: A Jinja file whose content replaces the tokenizer's own template.

    Raises:
        ModelError: It cannot be read, or it is no fast tokenizer (masks need character offsets).
    """
    from transformers import AutoTokenizer

    located = locate_model(spec)

    def read() -> Any:
        found = AutoTokenizer.from_pretrained(located.path_or_id, **_source(spec, located))
        if located.gguf_file:
            # transformers 5.17 takes a GGUF file's first token for the last.
            end = load_config(spec).eos_token_id
            if isinstance(end, int) and found.eos_token_id != end:
                found.eos_token = found.convert_ids_to_tokens(end)
        return found

    with explained(spec, "tokenizer"):
        tokenizer = kept_tokenizer(gguf_path(located), read) if located.gguf_file else read()
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of `{spec.id}` has no fast version, so no character offsets",
            help="take a model with a tokenizer.json",
        )
    if tokenizer.pad_token_id is None:
        # Padding is never in the loss and never attended to: any token serves.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if chat_template is not None:
        tokenizer.chat_template = read_template(Path(chat_template).expanduser())
    return tokenizer


def read_template(path: Path) -> str:
    """The chat template that a recipe names.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return read_regular(path, MAX_TEMPLATE_BYTES, follow=True).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the chat template {path}: {error}",
            help="`data.chat_template` names a UTF-8 Jinja file; a run keeps a copy beside what it trained",
        ) from error


def load_base(spec: ModelSpec, method: Method, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the base weights as the method wants them: in its dtype, quantized or not, nothing trained yet.

    Args:
        spec: The recipe's model block.
        method: Says in which dtype and with which quantization, and may change the configuration.
        dtype: What the model computes in.
        device: Where it goes.

    Raises:
        ModelError: The weights cannot be read.
    """
    located = locate_model(spec)
    check_causal(spec)
    attention: str = spec.attention
    if attention == "auto":  # a recipe that no plan was made of
        built = build_on_meta(configured(spec, method), trust_remote_code=spec.trust_remote_code)
        attention, _ = settle_attention(spec, method, built)
    quantization = method.quantization_config(dtype)
    where, source = located.path_or_id, _source(spec, located)
    settings: dict[str, Any] = {
        "config": configured(spec, method),
        "dtype": method.base_dtype(dtype),
        "attn_implementation": method.attention(attention),
        # Told below by the tensors' names; transformers itself would fill them in.
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    with explained(spec, "weights"), quiet(reports=False):
        dense = bits = None
        if not located.gguf_file:
            bits = stored_bits(settings["config"], spec.id)
            check_weights(spec)
        if located.gguf_file:
            plain = settings | {"config": load_config(spec)}
            del plain["attn_implementation"]
            kept = kept_weights(
                gguf_path(located), settings["dtype"], lambda: _dequantized(spec, where, plain | source)
            )
            if kept is None:
                dense = _dequantized(spec, where, settings | source)
            else:
                where, source = str(kept), {}
        if dense is None:
            if quantization is not None and bits is None:
                built = build_on_meta(configured(spec, method), trust_remote_code=spec.trust_remote_code)
                # Where there is a list transformers leaves out nothing else, the head included.
                quantization.llm_int8_skip_modules = not_quantizable(built) or None
                settings["quantization_config"] = quantization
            if quantization is not None or bits is not None:
                settings["device_map"] = {"": device}
            loaded = None if spec.trust_remote_code else load_cast(where, source.get("revision"), settings)
            if loaded is None:
                if not safetensors_files(where, source.get("revision")):
                    _refuse_others(spec, located)
                auto = auto_class(settings["config"])
                loaded = auto.from_pretrained(where, use_safetensors=True, **settings, **source)
            model, found = loaded
            require_whole(found, model, spec.id)
            if getattr(model, "_hf_peft_config_loaded", False):
                raise ModelError(
                    f"`{spec.id}` holds an adapter beside a model, which transformers puts onto it",
                    help="take a revision without adapter_config.json, or a model that it is merged into",
                )
            if bits == 4:
                adopt_4bit(model, method, dtype)
            elif bits == 8:
                dense = dense_of_8bit(model, settings["dtype"])
        if dense is not None:
            model = dense
            if quantization is not None:
                quantize(model, quantization, device)
    packed = quantization is not None or bits == 4
    if packed and device.type == "cpu":  # elsewhere nothing lies in the file
        leave_file(model)
    model.config.name_or_path = located.path_or_id
    keep_packed(model)
    model.config.use_cache = False
    model.requires_grad_(False)
    if not packed:
        # The device only: a cast would round buffers that must stay fp32 (RoPE's frequencies).
        model.to(device)
    if _small_leaks(spec, _state(spec)) is None:
        require_causal(sees_later_tokens(model), spec.id)
    return cast("nn.Module", model.train())


def check_weights(spec: ModelSpec, *, download: bool = True) -> tuple[str, ...]:
    """Hold that the files of a base model have all of its weights, before they are loaded.

    Of a GGUF file and of a model's own code that shows only once they are.

    Args:
        spec: The recipe's model block.
        download: Fetch files that are not here yet; else what is not here is not looked at.

    Returns:
        What to tell the user.

    Raises:
        ModelError: Names what is missing, of another shape, damaged, or not there at all.
    """
    located = locate_model(spec)
    if located.gguf_file or spec.trust_remote_code:
        return ()
    with explained(spec, "weights"):
        files = safetensors_files(located.path_or_id, located.revision, download=download)
    if not files and (download or located.kind == "directory"):
        _refuse_others(spec, located)
    if not files:
        return ()
    stats = [file.stat() for file in files]
    return _checked(spec, tuple(files), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


@functools.cache
def _checked(spec: ModelSpec, files: tuple[Path, ...], state: tuple[tuple[int, int], ...]) -> tuple[str, ...]:
    """Looked at once a process, by the plan and by what loads the weights, unless the files changed between."""
    config = load_config(spec)
    bits = stored_bits(config, spec.id)
    if bits is not None:
        del config.quantization_config
    notes = check_files(files, build_on_meta(config), spec.id, packed=bits is not None)
    if bits == 8:
        notes += (f"{spec.id} is stored in 8 bits, and dequantized as it is loaded: each weight takes `model.dtype`",)
    return notes


def _refuse_others(spec: ModelSpec, located: Located) -> NoReturn:
    """Refuse a model without safetensors by the names that transformers looks for.

    Pickled weights too, in ftune's own words: transformers would ask a service of the hub to convert them.
    """
    directory = Path(located.path_or_id)
    if located.kind == "directory" and (others := sorted(directory.glob("*.safetensors"))):
        raise ModelError(
            f"`{spec.id}` holds `{others[0].name}`, and neither `model.safetensors` nor an index of several files",
            help="rename it to model.safetensors; of several, copy their model.safetensors.index.json too",
        )
    what, help = "has no weights in safetensors, and ftune reads no others", SAFETENSORS_HELP
    if located.kind == "directory":
        alone = (
            "has no model.safetensors beside its config.json, and ftune reads no pickle",
            "copy it there, or name a model that has one",
        )
        what, help = other_weights(directory) or alone
    raise ModelError(f"`{spec.id}` {what}", help=help)


def _dequantized(spec: ModelSpec, path_or_id: str, settings: dict[str, Any]) -> Any:
    """Read a GGUF file as a dense model. One call cannot both do this and quantize to NF4."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model: Any
    model, found = AutoModelForCausalLM.from_pretrained(
        path_or_id, quantization_config=GgufConfig(dequantize=True), **settings
    )
    require_whole(found, model, spec.id)
    return forget_quantization(model)
