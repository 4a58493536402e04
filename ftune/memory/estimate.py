"""How much memory a run will need, from shapes alone, item by item.

The activations are counted as autograd keeps them for a pre-norm decoder in transformers under autocast, once
``ftune.plan.lean`` has replaced its layers. Let the residual stream have width ``d`` and ``s`` bytes an element, the
feed-forward ``f``, and attention ``h`` query heads and ``k`` key-value heads of width ``e``; let ``b`` be the bytes of
the compute dtype. A block keeps for each token

- of an RMS norm, its input and one fp32 number: ``s d + 4``; of a layer norm, its input;
- of attention inside documents, query, key, value and output: ``b (2 h e + 2 k e)``; where a fused kernel computes it
  (on the CPU in documents of over 1024 tokens), the logarithm of the sum of exponentials too: ``4 h``. Where a mask
  is needed (a window shorter than the row), keys and values are repeated for every query head (``k = h``), and every
  layer keeps a copy of the mask, ``b L^2`` for each row;
- of a gated feed-forward, gate and up projection: ``2 b f``; without a gate, the input of the activation;
- nothing of its linear layers: a frozen weight needs no gradient, and a trained or adapted one makes its input
  again of what the norm or the gate keeps. What adapters keep above that is each method's own
  ``saved_bytes_per_token``.

To that comes what the largest step of the backward pass takes for itself, the loss of one chunk of positions
(``ftune.ops.cross_entropy``), and on the CPU the holes between blocks of the C library's heap. How close all of it
comes is measured by ``scripts/measure_memory.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ftune.memory.kernels import kernel_bytes
from ftune.memory.request import Request
from ftune.memory.sharding import per_rank, shares_state, while_loading
from ftune.methods.saved_bytes import makes_input_again

__all__ = ["ITEMS", "MemoryEstimate", "estimate"]

ITEMS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "buffers", "runtime")
"""What a peak is made of, in the order in which it is shown."""

RUNTIME_BYTES = {"cpu": 468 * 2**20, "cuda": 80 * 2**20}
"""CPU: Python with torch, transformers, peft and accelerate imported, after a first update (measured on Linux), without
the kernels of matmuls (``ftune.memory.kernels``). CUDA: the workspaces of cuBLAS, of which PyTorch's allocator knows
(on an H100). The context is not the allocator's: what a device has left is counted without it (``ftune.available``)."""

IMPORT_BYTES = {"peft": 0, "ftune": -26 * 2**20, "transformers": 40 * 2**20}
"""What is imported beside or in place of that on a CPU, by the library that loads what is trained: adapters of our own
do without PEFT. The holes of a whole model in training were fitted with that much more."""

HOLES = 0.23
HOLES_WHOLE = 0.42
HOLES_RECOMPUTED = 0.1
"""Holes that glibc's heap keeps on the CPU, as a share of what the blocks keep in one forward pass: of blocks whose
activations live until the backward pass (where the whole model or a tied head trains, gradients and cast weights come
and go among them), and of recomputed ones, between which they are given back
(``ftune.run.memory.trim_between_blocks``). Fitted to SmolLM2-135M with rows of 512 and 2048 tokens, with the heap as
``ftune train`` sets it (``ftune.heap``)."""

LAST_STEP = 4
"""Tensors of the feed-forward's width that the backward pass of one gated feed-forward takes for itself."""


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
        logits: The loss over the vocabulary, one chunk of positions at a time.
        buffers: Masks, a trained head's gradient in the making, dequantized weights, temporaries of the backward
            pass and of the update, holes in the heap.
        runtime: Imported libraries on the CPU, the context on CUDA.
        total: The sum of all.
        loading: Bytes on the device while the base is whole there, where an engine shares it out afterwards, else 0;
            no part of the total.
        request: What was asked for; like ``loading`` no part of ``as_dict``.
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
    loading: int
    request: Request = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, int]:
        """The items and the total, in bytes."""
        return {name: getattr(self, name) for name in (*ITEMS, "total")}


def estimate(request: Request) -> MemoryEstimate:
    """Estimate the peak memory of training."""
    method, shape, dtype_bytes, device_type = request.method, request.shape, request.dtype_bytes, request.device_type
    activations, logits, buffers = _largest_moment(request)
    items = {
        "weights": method.base_bytes(shape, request.stored),
        "adapters": method.adapter_bytes(shape),
        "gradients": method.gradient_bytes(shape),
        "optimizer": method.optimizer_bytes(shape, request.optimizer),
        "activations": activations,
        "logits": logits,
        "buffers": buffers,
        "runtime": RUNTIME_BYTES[device_type],
    }
    if device_type == "cpu":
        items["runtime"] += IMPORT_BYTES[method.saved_as]
        items["runtime"] += kernel_bytes(method, shape, request.row_shapes) if dtype_bytes < 4 else 0
    loading = while_loading(items, request)
    items = per_rank(items, request)
    return MemoryEstimate(**items, total=sum(items.values()), loading=loading, request=request)


def _largest_moment(request: Request) -> tuple[int, int, int]:
    """Bytes of activations, of logits and of buffers at the moment when their sum is largest."""
    method, shape, dtype_bytes = request.method, request.shape, request.dtype_bytes
    length = request.length + method.virtual_positions
    tokens, layers, recomputed = request.rows * length, shape.layers, request.recomputed_blocks
    attended = length if request.longest is None else min(length, request.longest)
    masked = _masked(request, attended)

    kept = (
        tokens * _base_bytes_per_token(request, masked)
        + tokens * _logsumexp_bytes(request, attended, masked)
        + request.rows * _attention_matrices(request, length)
        + tokens * method.saved_bytes_per_token(shape, dtype_bytes)
        + method.saved_bytes(shape, dtype_bytes)
    )
    one_mask = request.rows * length**2 * dtype_bytes
    masks = (one_mask if masked else 0) + request.rows * method.mask_cells(length, request.packed) * dtype_bytes
    inputs = tokens * recomputed * shape.hidden * method.stream_bytes(request.stored)
    left = layers - recomputed
    held = kept * left // layers + inputs
    step = LAST_STEP * tokens * shape.intermediate * dtype_bytes + _dequantized_bytes(request)
    loss = _loss_bytes(request)
    # The gradient of a trained head is made with the loss, and scaled at the start of the backward pass.
    head = shape.extra["head_elements"] if request.trains_output else 0
    head_in_loss = head * (4 + 2 * (dtype_bytes if dtype_bytes < 4 else 0))
    # Of a head that is a trained embedding the gradients count the part that waits for the embedding's own.
    waiting = 4 * head if not request.whole else 0
    # (activations, logits, buffers) at each moment that may be the peak
    moments = [
        (held, loss, masks * left + head_in_loss - waiting),
        (held, 0, masks * left + 8 * head - waiting),
        (held, 0, masks * left + 4 * head - waiting + step),
        (0, 0, _update_bytes(request)),
    ]
    if recomputed:
        moments.append((inputs + kept // layers, 0, masks + step))
    activations, logits, buffers = max(moments, key=sum)
    if request.device_type == "cpu":
        holes = HOLES_WHOLE if request.trains_output else HOLES
        buffers += int(kept * (holes * left + HOLES_RECOMPUTED * recomputed) / layers)
    return activations, logits, buffers


def _update_bytes(request: Request) -> int:
    """Bytes that the optimizer's update takes for itself, on CUDA."""
    engine, several = request.engine, request.processes > 1
    if request.device_type != "cuda" or (engine == "fsdp2-offload" and several and request.whole):
        return 0
    shared_by = request.processes if shares_state(request.method, engine) else 1
    return request.method.update_bytes(request.shape, request.optimizer) // shared_by


def _loss_bytes(request: Request) -> int:
    """Bytes of one chunk's logits, and of all hidden states and their gradient."""
    from ftune.ops.cross_entropy import chunk_size, least_chunk

    shape, tokens, compute = request.shape, request.target_tokens, request.dtype_bytes
    on_cuda = request.device_type == "cuda"
    least = least_chunk(tokens, shape.vocab, shape.hidden, trained=request.trains_output)
    chunk = min(tokens, chunk_size(shape.vocab, request.device_type, least=least))
    # Without a fused kernel fp32 logits lie beside them.
    each = compute if (on_cuda and request.fused_loss) or compute == 4 else 4 + compute
    return chunk * shape.vocab * each + 2 * tokens * shape.hidden * compute


def _masked(request: Request, length: int) -> bool:
    """Whether attention takes a mask: padding on the right of causal attention needs none, nor do documents."""
    attention, extra = request.attention, request.shape.extra
    if attention == "flash_attention_2":
        return False
    by_document = attention == "sdpa" and not (request.device_type == "cpu" and extra.get("attention_dropout"))
    window = extra.get("sliding_window")
    slides = window is not None and length > window
    return slides or (request.packed and not by_document)


def _base_bytes_per_token(request: Request, masked: bool) -> int:
    """Bytes that all blocks keep for one token, without what adapters keep and without anything quadratic."""
    shape, stored, compute = request.shape, request.stored, request.dtype_bytes
    extra = shape.extra
    query = shape.heads * shape.head_dim
    key = query if masked and request.attention == "sdpa" else shape.kv_heads * shape.head_dim
    attended = shape.layers * compute * (2 * query + 2 * key)
    feed_forward = extra["ffn_saved"] * extra["ffn_width"] * compute
    if extra["pre_norm"]:
        # the residual stream is normalized in its own dtype, what a projection gave in the compute dtype
        residual = min(extra["norm_width"], (2 * shape.layers + 1) * shape.hidden)
        norms = residual * stored + (extra["norm_width"] - residual) * compute
        norms += 4 * extra["norm_width"] // shape.hidden
    elif extra["rms"]:
        # of OLMo's form, which rounds in another order where its weight is wider than what it reads
        norms = extra["norm_width"] * (2 * stored if request.whole and compute < stored else stored)
    else:
        # autocast computes layer norms in fp32 on CUDA
        norms = extra["norm_width"] * (4 if request.device_type == "cuda" else stored)
    inputs = 0
    if request.whole and compute == stored:
        # plain linear layers: norms' outputs (shared by the projections that read them), the feed-forward's product
        inputs = 2 * shape.layers * shape.hidden + extra["ffn_width"]
    elif request.whole:
        # cast for each layer anew, but for what norms and SwiGLU recompute; attention's output is attention's own
        inputs = (
            sum(linear.in_features for linear in shape.linears if not makes_input_again(shape, linear))
            - shape.layers * query
        )
    return int(norms + attended + feed_forward + max(0, inputs) * compute)


def _logsumexp_bytes(request: Request, length: int, masked: bool) -> int:
    """Bytes that all layers keep for one token where a fused kernel computes attention.

    Of documents that only a CPU with AMX gives to that kernel nothing is counted: a plan is the same on every CPU, and
    it is some 0.3 % of what a token keeps.
    """
    from ftune.ops.document_attention import LONG

    attention, shape = request.attention, request.shape
    by_blocks = request.device_type == "cpu" and attention == "sdpa" and not masked and length <= LONG
    return 0 if by_blocks or attention == "eager" else 4 * shape.heads * shape.layers


def _attention_matrices(request: Request, length: int) -> int:
    """Bytes of attention probabilities that all layers keep for one row, where the kernel makes them."""
    shape, compute = request.shape, request.dtype_bytes
    cells = shape.layers * shape.heads * length**2
    if request.attention == "eager":
        # the softmax in fp32, its copy in the compute dtype, and the tanh of capped scores
        copy = compute if compute < 4 else 0
        return int(cells * (4 + copy + compute * bool(shape.extra.get("softcap"))))
    if request.attention == "sdpa" and request.device_type == "cpu" and shape.extra.get("attention_dropout"):
        # with dropout the CPU has no fused kernel: probabilities, dropped ones and the mask, all fp32
        return cells * 12
    return 0


def _dequantized_bytes(request: Request) -> int:
    """Bytes of the largest dequantized weight, where the method keeps 4-bit ones."""
    shape, stored = request.shape, request.stored
    if request.method.base_bytes(shape, stored) >= shape.parameters * stored:
        return 0
    return request.dtype_bytes * max(linear.elements for linear in shape.linears)
