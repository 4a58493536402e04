"""A whole model saved and read back, as transformers does both.

transformers 5 keeps some weights in another form than checkpoints do: all experts of a layer in one tensor, heads and
routers under other names. It converts when it reads a checkpoint and converts back when it writes one, so what is
written here is read back by transformers itself, never by the names of the model's own parameters.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ftune.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["load_whole_model", "quiet", "save_whole_model", "without_generation_config"]


@contextlib.contextmanager
def without_generation_config(model: nn.Module, out: Path) -> Iterator[None]:
    """Leave a model's generation config out of what is saved meanwhile; it is written by itself, as it is.

    Older versions of transformers refuse to save one that many models are published with: a temperature without
    sampling.
    """
    from transformers import GenerationConfig

    whole = cast(Any, model)
    own = getattr(whole, "generation_config", None)
    if own is None:
        yield
        return
    whole.generation_config = GenerationConfig()
    try:
        yield
    finally:
        whole.generation_config = own
        (out / "generation_config.json").unlink(missing_ok=True)


def save_whole_model(model: nn.Module, out: Path, dtype: torch.dtype) -> None:
    """Save a transformers model in ``dtype`` without changing the one in memory."""
    whole = cast(Any, model)
    # A tied head must stay one tensor with the embedding, or it is written twice.
    cast_once: dict[tuple[int, torch.Size], Tensor] = {}
    state = {
        name: cast_once.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().to(dtype))
        for name, tensor in model.state_dict().items()
    }
    before = whole.config.dtype, whole.config.use_cache
    try:
        # Training goes without a cache; whoever loads the model wants one.
        whole.config.dtype, whole.config.use_cache = dtype, True
        with quiet(), without_generation_config(model, out):
            whole.save_pretrained(str(out), state_dict=state)
    finally:
        whole.config.dtype, whole.config.use_cache = before


def load_whole_model(base: nn.Module, directory: Path) -> nn.Module:
    """Copy the weights of a saved model over ``base``, which keeps its dtype and device.

    Raises:
        ModelError: The directory holds another architecture, or not all of the model.
    """
    import torch
    from safetensors import SafetensorError

    whole = cast(Any, base)
    with quiet(reports=False):
        try:
            stored = _stored_dtype(directory) or next(base.parameters()).dtype
            # In the dtype of the files, so that they are mapped and not copied.
            saved, report = type(whole).from_pretrained(
                str(directory),
                config=copy.deepcopy(whole.config),
                dtype=stored,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise ModelError(
                f"cannot read the model in {directory}: {str(error).strip().splitlines()[0]}",
                help="train the run again, or restore the files",
            ) from error
    wrong = [str(name) for key in ("missing_keys", "unexpected_keys") for name in sorted(report[key])]
    wrong += [str(entry[0]) for entry in sorted(report["mismatched_keys"])]
    if wrong:
        raise ModelError(
            f"{directory} does not hold the weights of this model: {', '.join(wrong[:3])}",
            help="it was trained on another base, or its files were changed: train the run again",
        )
    with torch.no_grad():
        base.load_state_dict(saved.state_dict())
    whole.tie_weights()
    return base


def _stored_dtype(directory: Path) -> torch.dtype | None:
    """The dtype of the first tensor in a directory's files."""
    import torch
    from safetensors import safe_open

    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found: torch.dtype = opened.get_tensor(name).dtype
                return found if found.is_floating_point else torch.float32
    return None


@contextlib.contextmanager
def quiet(*, reports: bool = True) -> Iterator[None]:
    """Without the progress bars of transformers; where not ``reports``, without its report of what a file lacks."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    if not reports:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
