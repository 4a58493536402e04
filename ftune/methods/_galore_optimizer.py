"""AdamW whose moments of chosen matrices live in a subspace of the gradient: the optimizer of GaLore.

Its state is tensors only, so that ``torch.load(weights_only=True)`` reads it back. What is random depends on
(seed, update, index of the parameter) and the kind of device alone, so no random state is kept.
"""

from __future__ import annotations

import functools
import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from ftune.errors import RunFailed
from ftune.ops.galore import (
    BLOCK,
    Basis,
    adam_direction,
    captured_energy,
    coarse_products,
    from_8bit,
    lift,
    project,
    rotate_moments,
    round_to_bfloat16,
    subspace,
    to_8bit,
)
from ftune.ops.sharded import local, part_like, whole

__all__ = ["PIECE", "GaLoreAdamW"]

PIECE = 2**24
"""Elements that are updated together where no subspace ties them. The embedding of a large vocabulary has hundreds of
millions, and an update takes nine times as much in fp32. A multiple of the blocks in which states are quantized."""

_SCALES = "_scales"
"""Ending of the entry that holds the block scales of a quantized state."""


class GaLoreAdamW(Optimizer):
    """AdamW with projected matrices (GaLore, arXiv:2403.03507, algorithm 2), decoupled decay and a state of tensors.

    Update ``t`` of a projected matrix: every ``update_every`` updates, the first included, ``Q`` becomes the leading
    singular vectors of its gradient ``G``; Adam runs on ``Q^T G``; its direction ``N`` moves the weight by
    ``-lr * scale * Q N``. Weight decay multiplies the weight by ``1 - lr * weight_decay``, as in torch's AdamW, for
    projected matrices as for others. A group whose ``rank`` is None gets plain AdamW.

    The state of a parameter, all fp32 (8 bits: the matrices as codes, with ``*_scales``):

    - ``step``: updates made; ``exp_avg``, ``exp_avg_sq``: the moments;
    - projected: ``basis`` (S, r), ``refreshes``: how often it was computed, ``captured``: the share of the
      gradient's energy in it when it was.

    Args:
        groups: ``{"params": [...], "lr": float, "weight_decay": float, "rank": int | None}`` each.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        update_every: Updates between two subspaces (T).
        scale: Factor of the projected update (alpha).
        basis: How the subspace is computed.
        reproject_moments: Whether the moments are rotated into a new subspace; else they stay as numbers, as
            published.
        bits: 32, or 8: the moments and bases of matrices quantized by blocks. Vectors stay fp32.
        seed: Of the randomized basis and of the rounding of bf16 weights.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        update_every: int,
        scale: float,
        basis: Basis,
        reproject_moments: bool,
        bits: int,
        seed: int,
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "rank": None})
        for group in self.param_groups:
            # The loop sets lr = base_lr * scale(step).
            group.setdefault("base_lr", group["lr"])
        self.update_every, self.scale, self.basis, self.reproject_moments = (
            update_every,
            scale,
            basis,
            reproject_moments,
        )
        self.bits, self.seed = bits, seed
        self._norms: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; gradients must be finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, (parameter, place) in enumerate(self._members()):
            if parameter.grad is not None:
                self._update(parameter, index, place)
        return loss

    # --- one parameter ---

    def _members(self) -> list[tuple[nn.Parameter, int]]:
        """All parameters, each with the number of its group; their own numbers here are part of what is random."""
        return [(parameter, place) for place, group in enumerate(self.param_groups) for parameter in group["params"]]

    def _update(self, parameter: nn.Parameter, index: int, place: int) -> None:
        group, state = self.param_groups[place], self.state[parameter]
        assert parameter.grad is not None
        # Where a process has only a part: a subspace is one of the whole gradient. The state is whole everywhere.
        grad = whole(parameter.grad)
        if group["rank"] is None:
            self._update_in_pieces(parameter, grad.contiguous(), state, group, index)
            return
        # A gradient of 16 bits is exact in TF32, and the weight's own rounding is coarser.
        coarse = grad.is_cuda and grad.dtype.itemsize == parameter.dtype.itemsize == 2
        grad = grad.float()
        done = int(state["step"]) if state else 0
        if done % self.update_every == 0:
            self._renew(state, grad, group, done, index)
        basis = self._read(state, "basis")
        with coarse_products(coarse):
            grad = project(grad, basis)
        if not done:
            state["step"] = torch.zeros(())
            for key in ("exp_avg", "exp_avg_sq"):
                self._write_zeros(state, key, grad)
        first, second = self._read(state, "exp_avg"), self._read(state, "exp_avg_sq")
        direction = adam_direction(first, second, grad, group["betas"], group["eps"], done + 1)
        self._write(state, "exp_avg", first)
        self._write(state, "exp_avg_sq", second)
        state["step"] += 1
        with coarse_products(coarse):
            direction = lift(direction, basis).mul_(self.scale)
        rate, decay = group["lr"], group["weight_decay"]
        if parameter.dtype == torch.float32:
            parameter.mul_(1 - rate * decay).add_(part_like(direction, parameter), alpha=-rate)
        else:
            moved = whole(parameter).float().mul_(1 - rate * decay).add_(direction, alpha=-rate)
            rounded = round_to_bfloat16(moved, self._generator("rounding", index, done, parameter.device))
            parameter.copy_(part_like(rounded, parameter))

    def _update_in_pieces(
        self, parameter: nn.Parameter, grad: Tensor, state: dict[str, Any], group: dict[str, Any], index: int
    ) -> None:
        """AdamW of a parameter that is not projected, ``PIECE`` elements at a time; ``grad`` is the whole gradient."""
        if not state:
            state["step"] = torch.zeros(())
            for key in ("exp_avg", "exp_avg_sq"):
                self._write_zeros(state, key, grad)
        done = int(state["step"])
        factor, rate = 1 - group["lr"] * group["weight_decay"], group["lr"]
        generator = None
        if parameter.dtype != torch.float32:
            generator = self._generator("rounding", index, done, parameter.device)
        full = whole(parameter.detach())
        weights, grads = full.contiguous().view(-1), grad.view(-1)
        for start in range(0, len(weights), PIECE):
            here = slice(start, start + PIECE)
            part = {key: _piece(value, key, here) for key, value in state.items()}
            first, second = self._read(part, "exp_avg"), self._read(part, "exp_avg_sq")
            direction = adam_direction(first, second, grads[here].float(), group["betas"], group["eps"], done + 1)
            for key, moment in (("exp_avg", first), ("exp_avg_sq", second)):
                if state[key].dtype == torch.uint8:
                    self._write_piece(part, key, moment)
            if generator is None:
                weights[here].mul_(factor).add_(direction, alpha=-rate)
            else:
                moved = weights[here].float().mul_(factor).add_(direction, alpha=-rate)
                weights[here].copy_(round_to_bfloat16(moved, generator))
        if weights.data_ptr() != local(parameter).data_ptr():  # gathered, or copied to lie in one piece
            parameter.copy_(part_like(weights.view(full.shape), parameter))
        state["step"] += 1

    def _renew(self, state: dict[str, Any], grad_MN: Tensor, group: dict[str, Any], done: int, index: int) -> None:
        """Compute the subspace of this gradient, and take the moments into it where that is asked."""
        generator = self._generator("basis", index, done, grad_MN.device)
        basis_Sr = subspace(grad_MN, group["rank"], self.basis, generator)
        if distributed.is_available() and distributed.is_initialized():
            # The gradients are equal, but other hardware may turn near-equal singular vectors into each other.
            distributed.broadcast(basis_Sr, 0)
        old_Sr = self._read(state, "basis") if done and self.reproject_moments else None
        self._write(state, "basis", basis_Sr)
        basis_Sr = self._read(state, "basis")
        if old_Sr is not None:
            moments = self._read(state, "exp_avg"), self._read(state, "exp_avg_sq")
            first, second = rotate_moments(*moments, basis_Sr.T @ old_Sr, group["betas"], done)
            self._write(state, "exp_avg", first)
            self._write(state, "exp_avg_sq", second)
        state["refreshes"] = state.get("refreshes", torch.zeros(())) + 1
        state["captured"] = captured_energy(grad_MN, project(grad_MN, basis_Sr)).cpu()

    def _generator(self, use: str, index: int, done: int, device: torch.device) -> torch.Generator:
        digest = hashlib.blake2b(f"{use}/{self.seed}/{done}/{index}".encode(), digest_size=7).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest))

    # --- state ---

    def _read(self, state: dict[str, Any], key: str) -> Tensor:
        """A state in fp32: the stored tensor itself, or what its codes mean."""
        stored: Tensor = state[key]
        if stored.dtype != torch.uint8:
            return stored
        root = key == "exp_avg_sq"
        values = from_8bit(stored, state[key + _SCALES], signed=not root)
        return values.square_() if root else values

    def _write(self, state: dict[str, Any], key: str, values: Tensor) -> None:
        """Keep a state, quantized where it is a matrix and 8 bits are asked for."""
        if self.bits == 32 or values.ndim < 2:
            state[key] = values
            return
        state[key], state[key + _SCALES] = _quantized(key, values)

    def _write_zeros(self, state: dict[str, Any], key: str, like: Tensor) -> None:
        """Begin a state, without quantizing as many zeros."""
        if self.bits == 32 or like.ndim < 2:
            state[key] = torch.zeros_like(like, dtype=torch.float32)
            return
        code = _quantized(key, torch.zeros(1))[0]
        state[key] = torch.full_like(like, int(code), dtype=torch.uint8)
        state[key + _SCALES] = like.new_zeros(-(-like.numel() // BLOCK), dtype=torch.float32)

    @staticmethod
    def _write_piece(part: dict[str, Any], key: str, values: Tensor) -> None:
        codes, scales = _quantized(key, values)
        part[key].copy_(codes)
        part[key + _SCALES].copy_(scales)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state as it was saved: torch's own would cast it to the dtype of each parameter."""
        super().load_state_dict({**state_dict, "state": {}})
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, (parameter, _) in zip(saved, self._members(), strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                # Counters stay on the CPU: they are read at every update.
                device = parameter.device if value.ndim else torch.device("cpu")
                self.state[parameter][key] = value.detach().to(device, copy=True)

    @property
    def state_bytes(self) -> int:
        """Bytes of moments, bases and scales; the three counters of a tensor are left out."""
        tensors = [tensor for state in self.state.values() for tensor in state.values() if tensor.ndim]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # --- updating in the backward pass ---

    def update_in_backward(self, names: Mapping[nn.Parameter, str]) -> None:
        """From now on update each parameter as soon as its gradient is complete, and free that gradient.

        Args:
            names: Of the parameters, for messages.
        """
        # Weak: a hook lives as long as its parameter, and must not keep the optimizer, and so the model, alive.
        for index, (parameter, place) in enumerate(self._members()):
            hook = functools.partial(_update_now, weakref.ref(self), names[parameter], index, place)
            cast(Any, parameter).register_post_accumulate_grad_hook(hook)

    def _update_now(self, parameter: nn.Parameter, name: str, index: int, place: int) -> None:
        assert parameter.grad is not None
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        if not torch.isfinite(norm):
            done = int(self.state[parameter]["step"]) if parameter in self.state else 0
            raise RunFailed(
                f"the norm of the gradient of `{name}` is {float(norm)} at step {done + 1}: it was not applied",
                help="lower optimizer.learning_rate, or look at the data; `per_layer: false` names the rows",
            )
        self._norms[parameter] = norm
        self._update(parameter, index, place)
        parameter.grad = None

    def take_gradient_norm(self, parameters: Iterable[nn.Parameter]) -> float:
        """The global norm of the gradients that the last backward pass applied; they are forgotten."""
        norms = [self._norms[parameter] for parameter in parameters if parameter in self._norms]
        self._norms.clear()
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _quantized(key: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a moment.

    Of the second moment the root: it spans as many orders of magnitude as the first moment, so whatever is too small
    for its codes is so in both.
    """
    root = key == "exp_avg_sq"
    return to_8bit(values.sqrt() if root else values, signed=not root)


def _piece(value: Tensor, key: str, here: slice) -> Tensor:
    """The part of a state that belongs to these elements."""
    if key == "step":
        return value
    if key.endswith(_SCALES):
        return value[here.start // BLOCK : -(-here.stop // BLOCK)]
    return value.view(-1)[here]


@torch.no_grad()
def _update_now(reference: weakref.ref[GaLoreAdamW], name: str, index: int, place: int, parameter: Tensor) -> None:
    """The hook: without its optimizer it does nothing."""
    optimizer = reference()
    if optimizer is not None:
        optimizer._update_now(cast(nn.Parameter, parameter), name, index, place)
