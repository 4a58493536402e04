"""How much memory a run will need, from shapes alone, item by item.

The activations are counted as autograd keeps them for a pre-norm decoder in transformers under autocast.
Let the residual stream have width ``d``, the feed-forward ``f``, and attention ``h`` query heads and ``k``
key-value heads of width ``e``; let ``b`` be the bytes of the compute dtype. A block whose weights are frozen
keeps for each token

- of an RMS norm, its input in fp32: ``4 d`` (transformers computes the norm through an fp32 copy); of a layer
  norm, its input as it is;
- of attention by ``scaled_dot_product_attention``, query, key, value, output and the logarithm of the sum of
  exponentials: ``b (2 h e + 2 k e) + 4 h``. With a mask the keys and values are repeated for every query head
  (``k = h``), and every layer keeps a copy of the mask in the compute dtype, ``b L^2`` for each row;
- of a gated feed-forward, gate, activated gate and up projection: ``3 b f``; without a gate, the input of the
  activation;
- nothing of its linear layers: a frozen weight needs no gradient, so the input is not kept. What adapters
  keep above that is each method's own ``saved_bytes_per_token``.

Where the weights themselves train, every linear layer keeps its input too, and every norm its normalized
input. The logits are counted at the positions in the loss only. The C library's allocator adds its own on the
CPU. ``scripts/measure_memory.py`` prints measured peaks beside these predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftune.human import bytes_text
from ftune.methods import METHODS, Method, ModelShape
from ftune.methods.quantization import Quantization

__all__ = ["ITEMS", "MemoryEstimate", "available_bytes", "estimate", "what_to_change"]

ITEMS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "buffers", "runtime")
"""What a peak is made of, in the order in which it is shown."""

LOSS_BYTES = 12
"""Bytes a logit takes at the start of the backward pass: log-softmax, its gradient, the logits' gradient."""

RUNTIME_BYTES = {"cpu": 560 * 2**20, "cuda": 600 * 2**20}
"""CPU: Python with torch, transformers, peft, datasets and accelerate imported, after a first update
(measured on Linux). CUDA: the context and the workspaces of cuBLAS (an allowance, not measured)."""

HEAP_SHARE_OF_BASE = 0.2
HEAP_SHARE_OF_METHOD = 0.9
HEAP_SHARE_OF_COPIES = 0.5
"""Holes that glibc's heap keeps on the CPU, as shares of what is allocated between them: the base model's
activations, those of the method (which makes and frees about as much again), autocast's copies of weights.
Fitted to SmolLM2-135M; with every block mapped on its own (MALLOC_MMAP_THRESHOLD_) the holes vanish."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes as they lie in memory at the moment of the peak; ``total`` is their sum.

    The peak is the largest of four moments: the end of the forward pass, the loss, the recomputation of a
    block (with gradient checkpointing) and the optimizer's update. So ``logits`` is 0 where a recomputed
    block needs more.

    Attributes:
        weights: The base model.
        adapters: Trained parameters that are no base weights.
        gradients: fp32 gradients of what trains.
        optimizer: Optimizer state.
        activations: What autograd keeps for the backward pass.
        logits: The loss over the vocabulary.
        buffers: Masks, autocast's copies of trained weights, dequantized weights, temporaries of the update,
            holes in the heap.
        runtime: Imported libraries on the CPU, the context on CUDA.
        total: The sum of all.
        arguments: What ``estimate`` was called with; no part of ``as_dict``.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    runtime: int
    total: int
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def as_dict(self) -> dict[str, int]:
        """The items and the total, in bytes."""
        return {name: getattr(self, name) for name in (*ITEMS, "total")}


def estimate(
    method: Method,
    shape: ModelShape,
    *,
    optimizer: str,
    dtype_bytes: int,
    rows: int,
    length: int,
    target_tokens: int,
    gradient_checkpointing: bool,
    attention: str,
    device_type: str,
    packed: bool,
) -> MemoryEstimate:
    """Estimate the peak memory of training, on one device.

    Args:
        method: The method, with its settings.
        shape: The base model.
        optimizer: Its name in the recipe.
        dtype_bytes: Bytes of an element in the dtype the model computes in.
        rows: Sequences in a micro-batch.
        length: Tokens in a row.
        target_tokens: Tokens in the loss, in a micro-batch.
        gradient_checkpointing: Whether blocks are recomputed in the backward pass.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``.
        device_type: ``cpu`` or ``cuda``.
        packed: Whether rows hold several documents, which takes a mask to keep apart.
    """
    arguments = dict(locals())
    length += method.virtual_positions
    tokens = rows * length
    layers, trained = shape.layers, method.trainable_parameters(shape)
    whole = method.artifact == "model"
    stored = _stored_bytes(method, dtype_bytes)
    # padding on the right of causal attention needs no mask
    masked = attention != "flash_attention_2" and (packed or _slides(shape, length))

    kept_by_base = tokens * _base_bytes_per_token(
        shape, whole, stored, dtype_bytes, attention, masked, device_type
    ) + rows * _attention_matrices(shape, length, dtype_bytes, attention, device_type)
    kept_by_method = tokens * method.saved_bytes_per_token(shape, dtype_bytes) + method.saved_bytes(shape, dtype_bytes)
    kept = kept_by_base + kept_by_method
    mask = rows * length**2 * dtype_bytes * masked
    kept_masks = layers * rows * method.mask_cells(length) * dtype_bytes * masked
    logits = target_tokens * shape.vocab
    # Autocast casts a trained fp32 weight once in a forward pass; the copy lives until its backward is done.
    cast = dtype_bytes if dtype_bytes < (stored if whole else 4) else 0
    head_copy = cast * shape.extra["head_elements"] if whole else 0
    copies = cast * sum(linear.elements for linear in shape.linears) + head_copy if whole else cast * trained
    scratch = _dequantized_bytes(method, shape, stored, dtype_bytes)

    # (activations, logits, buffers) at each moment that may be the peak
    moments: list[tuple[int, int, int]] = []
    if gradient_checkpointing:
        inputs = tokens * layers * shape.hidden * stored
        one_block = kept // layers
        moments += [
            (inputs, logits * dtype_bytes, copies + mask),
            (inputs, logits * LOSS_BYTES, head_copy),
            # the gradients inside a block are about as large as its feed-forward's activations
            (
                inputs + one_block + 3 * tokens * shape.extra["ffn_width"] // layers * dtype_bytes,
                0,
                copies // layers + mask + scratch,
            ),
        ]
    else:
        moments.append((kept, logits * LOSS_BYTES, copies + kept_masks + scratch))
    moments.append((0, 0, method.update_bytes(shape, optimizer) if device_type == "cuda" else 0))

    activations, logit_bytes, buffers = max(moments, key=sum)
    if device_type == "cpu":
        # checkpointing frees activations but leaves the holes between what it keeps
        buffers += int(
            HEAP_SHARE_OF_BASE * kept_by_base
            + HEAP_SHARE_OF_METHOD * kept_by_method
            + HEAP_SHARE_OF_COPIES * copies * whole
        )
    items = {
        "weights": method.base_bytes(shape, stored),
        "adapters": method.adapter_bytes(shape),
        "gradients": method.gradient_bytes(shape),
        "optimizer": method.optimizer_bytes(shape, optimizer),
        "activations": activations,
        "logits": logit_bytes,
        "buffers": buffers,
        "runtime": RUNTIME_BYTES[device_type],
    }
    return MemoryEstimate(**items, total=sum(items.values()), arguments=arguments)


def _stored_bytes(method: Method, dtype_bytes: int) -> int:
    """Bytes of a base weight that is not quantized, as the method keeps it."""
    import torch

    return method.base_dtype(torch.float32 if dtype_bytes == 4 else torch.bfloat16).itemsize


def _slides(shape: ModelShape, length: int) -> bool:
    """Whether some layer's attention window is shorter than the row, so that a mask is needed."""
    window = shape.extra.get("sliding_window")
    return window is not None and length > window


def _base_bytes_per_token(
    shape: ModelShape, whole: bool, stored: int, compute: int, attention: str, masked: bool, device_type: str
) -> int:
    """Bytes that all blocks keep for one token, without what adapters keep and without anything quadratic.

    whole: the base weights train; stored, compute: bytes of a weight and of a computed element.
    """
    extra = shape.extra
    if extra["rms"]:
        norms = extra["norm_width"] * (4 + (stored if whole else 0))
    else:
        # autocast computes layer norms in fp32 on CUDA
        norms = extra["norm_width"] * (4 if device_type == "cuda" else stored)
    query = shape.heads * shape.head_dim
    key = query if masked and attention == "sdpa" else shape.kv_heads * shape.head_dim
    attended = shape.layers * (compute * (2 * query + 2 * key) + 4 * shape.heads)
    feed_forward = extra["ffn_saved"] * extra["ffn_width"] * compute
    inputs = 0
    if whole and compute < stored:
        # autocast casts the input for each linear layer anew; the output projection's is attention's output
        inputs = compute * (sum(linear.in_features for linear in shape.linears) - shape.layers * query)
    elif whole:
        # norms' outputs (shared by the projections that read them) and the feed-forward's product
        inputs = compute * (2 * shape.layers * shape.hidden + extra["ffn_width"])
    return int(norms + attended + feed_forward + inputs)


def _attention_matrices(shape: ModelShape, length: int, compute: int, attention: str, device_type: str) -> int:
    """Bytes of attention probabilities that all layers keep for one row, where the kernel makes them."""
    cells = shape.layers * shape.heads * length**2
    if attention == "eager":
        # the softmax in fp32, its copy in the compute dtype, and the tanh of capped scores
        copy = compute if compute < 4 else 0
        return int(cells * (4 + copy + compute * bool(shape.extra.get("softcap"))))
    if attention == "sdpa" and device_type == "cpu" and shape.extra.get("attention_dropout"):
        # with dropout the CPU has no fused kernel: probabilities, dropped ones and the mask, all fp32
        return cells * 12
    return 0


def _dequantized_bytes(method: Method, shape: ModelShape, stored: int, compute: int) -> int:
    """Bytes of the largest dequantized weight, where the method keeps 4-bit ones."""
    if method.base_bytes(shape, stored) >= shape.parameters * stored:
        return 0
    return compute * max(linear.elements for linear in shape.linears)


# --- advice ------------------------------------------------------------------------------------------------


def what_to_change(estimate_: MemoryEstimate, available: int, recipe: Any) -> list[str]:
    """Say what to change in the recipe when the run does not fit, with the bytes each change saves.

    Args:
        estimate_: An estimate from ``estimate``.
        available: Bytes of memory that the run may use.
        recipe: The recipe, from which the current values are read.

    Returns:
        One line for each change that saves at least 2 % of the total, the largest first, and one about all
        of them together when none suffices alone; nothing when the run fits.
    """
    if estimate_.total <= available:
        return []
    arguments = dict(estimate_.arguments)
    changes = _changes(arguments, recipe)
    saved = [(text, change, estimate_.total - _again(arguments, change).total) for text, change in changes]
    useful = sorted((item for item in saved if item[2] * 50 >= estimate_.total), key=lambda item: -item[2])
    lines = []
    for text, _, saving in useful:
        left = estimate_.total - saving
        verdict = "fits" if left <= available else f"then needs {bytes_text(left)}"
        lines.append(f"{text}: saves {bytes_text(saving)}, {verdict}")
    if all(estimate_.total - saving > available for *_, saving in useful):
        together: dict[str, Any] = {}
        for _, change, _ in useful:
            together |= change
        needed = _again(arguments, together).total
        if needed <= available:
            lines.append(f"all of these together: needs {bytes_text(needed)}, fits")
        else:
            least = f" (all of it together still needs {bytes_text(needed)})" if useful else ""
            lines.append(f"no change to the recipe is enough{least}: take a smaller model or a larger device")
    return lines


def _changes(arguments: dict[str, Any], recipe: Any) -> list[tuple[str, dict[str, Any]]]:
    """Changes to a recipe that save memory: what to write, and the arguments of ``estimate`` it changes."""
    changes: list[tuple[str, dict[str, Any]]] = []
    method: Method = arguments["method"]
    if not arguments["gradient_checkpointing"] and method.recomputable:
        changes.append(("training.gradient_checkpointing: true", {"gradient_checkpointing": True}))
    if arguments["rows"] > 1 and not method.updates_in_backward:
        rows = arguments["rows"]
        steps = recipe.training.gradient_accumulation_steps * rows
        changes.append(
            (
                f"training.micro_batch_size: 1 with gradient_accumulation_steps: {steps}",
                {"rows": 1, "target_tokens": arguments["target_tokens"] // rows},
            )
        )
    shorter = recipe.data.max_length // 2
    if shorter >= 128 and shorter < arguments["length"]:
        share = shorter / arguments["length"]
        changes.append(
            (f"data.max_length: {shorter}", {"length": shorter, "_target_share": share}),
        )
    if arguments["optimizer"] in ("adamw", "paged_adamw"):
        changes.append(("optimizer.name: adamw_8bit", {"optimizer": "adamw_8bit"}))
    changes += [(text, {"method": lighter}) for text, lighter in method.lighter()]
    if method.quantizable and method.base_quantization is None:
        smaller = method.model_copy(update={"quantization": Quantization()})
        changes.append(("method.quantization: {type: nf4}", {"method": smaller}))
    elif method.artifact == "model":
        # The method whose base is 4-bit unless it is told otherwise.
        small = [n for n, cls in METHODS.items() if getattr(cls.model_fields.get("quantization"), "default", None)]
        changes += [(f"method: {name}", {"method": METHODS[name]()}) for name in small[:1]]
    return changes


def _again(arguments: dict[str, Any], change: dict[str, Any]) -> MemoryEstimate:
    """Estimate once more with some arguments changed."""
    changed = arguments | change
    share = changed.pop("_target_share", 1.0)
    changed["target_tokens"] = max(1, int(changed["target_tokens"] * share))
    return estimate(**changed)


# --- what there is -----------------------------------------------------------------------------------------


def available_bytes(
    device_type: str,
    *,
    cgroup_root: Path = Path("/sys/fs/cgroup"),
    cgroup_file: Path = Path("/proc/self/cgroup"),
) -> int:
    """Bytes that this process may occupy in all, what it already holds included.

    On the CPU the smaller of what the system has left and what the process's control groups (containers,
    batch systems) leave; on CUDA what the current device has left.

    Args:
        device_type: ``cpu`` or ``cuda``.
        cgroup_root: Where the control groups' files are mounted.
        cgroup_file: Which names the process's own groups.
    """
    if device_type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved())
    import psutil

    left = int(psutil.virtual_memory().available)
    limit = _cgroup_left(cgroup_root, cgroup_file)
    return (left if limit is None else min(left, limit)) + int(psutil.Process().memory_info().rss)


def _cgroup_left(root: Path, own: Path) -> int | None:
    """The least that any of the process's control groups has left, or None where none is limited."""
    left: list[int] = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage, cache = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        # a limit of any ancestor binds; inside a container the own path may not exist under the mount
        directory = base / group.lstrip("/")
        for place in [directory, *directory.parents]:
            if base != place and base not in place.parents:
                break
            remaining = _group_left(place, limit, usage, cache)
            if remaining is not None:
                left.append(remaining)
    return min(left, default=None)


def _group_left(place: Path, limit: str, usage: str, cache: str) -> int | None:
    """What one control group has left: its limit, less its usage but for cached files it can drop."""
    try:
        allowed = (place / limit).read_text().strip()
        if allowed == "max":
            return None
        used = int((place / usage).read_text())
        statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        return max(0, int(allowed) - used + int(statistics.get(cache, 0)))
    except (OSError, ValueError):
        return None
