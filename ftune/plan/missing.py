"""Whether a base model's files hold all of its weights, in their shapes.

What a file does not hold, transformers makes up at random, differently at every load, and only prints a report. So
it is asked twice: of the files' headers, before anything is loaded, and of what was loaded. Both times transformers
itself says what is missing, through its own renaming and conversion of the names in the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.errors import ModelError
from ftune.models.whole import quiet
from ftune.plan.weights import STORED
from ftune.recipe.no_model import damage

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Header", "check_files", "read_headers", "require_finite", "require_whole"]

Header = tuple[Path, str, tuple[int, ...]]
"""Of a tensor: the file it is in, its dtype in safetensors' words, and its shape."""

NAMED = 4  # tensors named in a message
SAMPLE = 64  # rows of a tied tensor that are compared, of each end
_AGAIN = "copy, download or convert it again, or take another revision"


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """What the tensors of a checkpoint are, by name; none is read.

    Raises:
        ModelError: A file is damaged or cut short, is no safetensors file, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    headers: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt", backend="pread") as opened:
                for name in opened.offset_keys():
                    about = opened.get_slice(name)
                    headers[name] = (file, about.get_dtype(), tuple(about.get_shape()))
        except (OSError, SafetensorError) as error:
            what, help = damage(file) or (f"is damaged ({error})", _AGAIN)
            raise ModelError(f"`{file.parent.name}/{file.name}` {what}", help=help) from error
    return headers


def check_files(files: Iterable[Path], hollow: nn.Module, name: str, *, packed: bool = False) -> tuple[str, ...]:
    """Hold that safetensors files have every weight of a model, in its shape and unquantized.

    Args:
        files: The checkpoint's.
        hollow: The model, on the meta device; it is not changed.
        name: The model's, for messages.
        packed: Whether bitsandbytes stored it in 4 or 8 bits.

    Returns:
        What to tell the user: tensors that the model does not use.

    Raises:
        ModelError: Tensors are missing, have another shape or a dtype that needs scales, or are tied and differ.
    """
    import torch

    headers = read_headers(files)
    if packed:
        plain, headers = headers, _unpacked(headers)
        if headers == plain:
            raise ModelError(
                f"the config.json of `{name}` says that it is stored in 4 or 8 bits, and its files hold no scales",
                help="remove `quantization_config` from config.json where the weights are plain",
            )
    _refuse_scaled(headers, name)
    model: Any = hollow
    tensors = {
        stored: torch.empty(shape, dtype=_torch_dtype(dtype), device="meta")
        for stored, (_, dtype, shape) in headers.items()
    }
    try:
        # On the meta device nothing is computed or kept: what is left is the bookkeeping of names and shapes.
        with quiet(reports=False):
            _, found = type(model).from_pretrained(
                None,
                state_dict=tensors,
                config=model.config,
                dtype=torch.float32,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except RuntimeError as error:
        raise _unconverted(headers, name) from error
    require_whole(found, model, name)
    _require_tied(headers, model, name)
    if not found["unexpected_keys"]:
        return ()
    return (f"the files of {name} hold {_counted(found['unexpected_keys'], 'tensor')} that the model does not use",)


def require_whole(found: dict[str, Any], model: Any, name: str) -> None:
    """Hold that loading found every weight.

    Args:
        found: transformers' account of a load (``output_loading_info``).
        model: The model.
        name: Its name, for messages.

    Raises:
        ModelError: Names the tensors that are missing, of another shape, or tied and different.
    """
    missing, mismatched, others = found["missing_keys"], found["mismatched_keys"], found["unexpected_keys"]
    wrong = []
    if missing:
        wrong.append(f"no {_listed(missing)}")
    if mismatched:
        shapes = {key: f"`{key}` ({_size(there)}, not {_size(here)})" for key, there, here in mismatched}
        wrong.append(f"in another shape {_listed(shapes, shapes)}")
    if not wrong:
        # A pair that config.json ties and that differs in the files was left untied.
        untied = model.get_expanded_tied_weights_keys(all_submodels=True)
        for target in untied.keys() - model.all_tied_weights_keys.keys():
            raise _untied(name, target, untied[target])
        return
    total = len(model.state_dict())
    help = f"the weights do not belong to its config.json, or are not whole: {_AGAIN}"
    if set(missing) == {_head_name(model)} and not mismatched:
        help = (
            "a model's body or a classifier has no head for the next token: take the language model that it was made "
            "of; where the head is the embedding, config.json says `tie_word_embeddings: true`"
        )
    also = f"; instead they hold {_counted(others, 'tensor')} that it does not have" if others else ""
    count = len(missing) + len(mismatched)
    raise ModelError(
        f"the files of `{name}` do not hold {count} of the {total} tensors of {type(model).__name__}: they have "
        + " and ".join(wrong)
        + also,
        help=help,
    )


def require_finite(model: nn.Module, name: str) -> None:
    """Hold that no weight is NaN or infinite: one is enough to make every loss so.

    Args:
        model: Loaded; packed weights are passed over. Reading them takes under a second for 10^9 on a CPU's core.
        name: The model's, for messages.

    Raises:
        ModelError: Names the tensors.
    """
    import torch

    wrong = [
        key
        for key, tensor in model.named_parameters()
        if tensor.is_floating_point()
        and tensor.numel()
        and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())
    ]
    if wrong:
        raise ModelError(f"weights of `{name}` are NaN or infinite: {_listed(wrong)}", help=_AGAIN)


def _unpacked(headers: dict[str, Header]) -> dict[str, Header]:
    """What the tensors are that bitsandbytes packed, each with its scales beside it; others as they are.

    Without its scales a tensor stays what it is, and is refused as such.
    """
    import json

    from safetensors import SafetensorError, safe_open

    found = dict(headers)
    for name in headers:
        weight, mark, _ = name.partition(".quant_state.bitsandbytes__")
        if mark and {weight, f"{weight}.absmax", f"{weight}.quant_map"} <= headers.keys():
            file = headers[name][0]
            try:
                with safe_open(file, framework="pt", backend="pread") as opened:
                    state = json.loads(bytes(opened.get_tensor(name).tolist()))
                nested = "nested_offset" not in state or f"{weight}.nested_absmax" in headers
                shape = tuple(int(size) for size in state["shape"])
            except (SafetensorError, ValueError, KeyError, TypeError):
                continue
            if nested:
                found[weight] = (headers[weight][0], "F32", shape)
                for key in [key for key in headers if key.startswith(f"{weight}.")]:
                    found.pop(key, None)
        elif name.endswith(".SCB") and (weight := f"{name.removesuffix('.SCB')}.weight") in headers:
            found[weight] = (headers[weight][0], "F32", headers[weight][2])
            found.pop(name)
            found.pop(f"{weight}_format", None)
    return found


def _refuse_scaled(headers: dict[str, Header], name: str) -> None:
    """Refuse weights in a dtype that means nothing without its scales, where config.json does not speak of any."""
    scaled = {
        key: dtype
        for key, (_, dtype, _) in headers.items()
        if dtype not in STORED and (dtype.startswith(("F8", "F6", "F4")) or key.endswith(".weight"))
    }
    if scaled:
        dtypes = ", ".join(sorted(set(scaled.values())))
        raise ModelError(
            f"the files of `{name}` hold {_counted(scaled, 'weight')} in {dtypes}, and do not say how they are "
            "scaled (config.json: quantization_config)",
            help="take the model in bfloat16, float16 or float32",
        )


def _require_tied(headers: dict[str, Header], model: Any, name: str) -> None:
    """Hold that two tensors which config.json ties are one, as far as a sample of their rows tells."""
    prefix = f"{model.base_model_prefix}."

    def stored(key: str) -> str | None:
        return next((form for form in (key, key.removeprefix(prefix)) if form in headers), None)

    for target, source in model.all_tied_weights_keys.items():
        one, other = stored(target), stored(source)
        if one and other and one != other and _sample(headers, one) != _sample(headers, other):
            raise _untied(name, target, source)


def _untied(name: str, target: str, source: str) -> ModelError:
    """The refusal of two tensors that config.json ties, and that differ in the files."""
    return ModelError(
        f"`{target}` and `{source}` are tied by the config.json of `{name}`, and differ in its files",
        help="correct `tie_word_embeddings` in config.json: false keeps both",
    )


def _sample(headers: dict[str, Header], stored: str) -> tuple[Any, ...]:
    """A tensor's dtype, shape, and first and last rows."""
    import torch
    from safetensors import safe_open

    file, dtype, shape = headers[stored]
    if not shape:
        return dtype, shape
    with safe_open(file, framework="pt", backend="pread") as opened:
        tensor = opened.get_slice(stored)
        rows = torch.cat([tensor[:SAMPLE], tensor[max(0, shape[0] - SAMPLE) :]])
    return dtype, shape, rows.contiguous().view(torch.uint8).numpy().tobytes()


def _unconverted(headers: dict[str, Header], name: str) -> ModelError:
    """The refusal of tensors that transformers puts together, the experts of a block say, and that do not fit."""
    gaps = list(_gaps(headers))
    which = f": {_listed(gaps)} missing" if gaps else ""
    return ModelError(f"the files of `{name}` hold tensors that cannot be put together{which}", help=_AGAIN)


def _gaps(names: Iterable[str]) -> Iterator[str]:
    """Names that are missing in a numbered series where its like have them: expert 3 of 8 in one block."""
    series: dict[tuple[str, str], set[str]] = {}
    for name in names:
        if numbered := re.fullmatch(r"(.*)\.(\d+)\.(\D*)", name):
            before, number, after = numbered.groups()
            series.setdefault((before, after), set()).add(number)
    alike: dict[str, set[str]] = {}
    for (before, _), numbers in series.items():
        alike.setdefault(re.sub(r"\d+", "*", before), set()).update(numbers)
    for (before, after), numbers in series.items():
        for number in sorted(alike[re.sub(r"\d+", "*", before)] - numbers, key=int):
            yield f"{before}.{number}.{after}"


def _torch_dtype(stored: str) -> Any:
    import torch

    # Only floats are cast while loading, and none here: any dtype of another kind will do.
    return getattr(torch, STORED[stored]) if stored in STORED else torch.uint8


def _head_name(model: Any) -> str | None:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    return next((key for key, tensor in model.state_dict(keep_vars=True).items() if tensor is weight), None)


def _size(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _counted(names: Iterable[str], what: str) -> str:
    names = list(names)
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({_listed(names)})"


def _listed(names: Iterable[str], shown: dict[str, str] | None = None) -> str:
    """The first few names, in the order of their numbers."""
    ordered = sorted(names, key=lambda name: [(part.isdigit(), part.zfill(8)) for part in re.split(r"(\d+)", name)])
    first = [shown[name] if shown else f"`{name}`" for name in ordered[:NAMED]]
    return ", ".join(first) + (f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else "")
