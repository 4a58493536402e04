"""GaLore: every weight trains, and AdamW's moments of the matrices live in a subspace of the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import Field

from ftune.errors import ModelError
from ftune.methods._galore_bytes import bits_of, tensor_bytes
from ftune.methods.base import Method
from ftune.methods.optimizer import OptimizerSpec
from ftune.methods.targets import different, list_linears, match_targets, target_problems
from ftune.methods.types import Context, Linear, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from ftune.methods._galore_optimizer import GaLoreAdamW

__all__ = ["GaLore"]


class GaLore(Method):
    """Train every parameter, with moments of rank r for the matrices (Zhao et al., arXiv:2403.03507)."""

    paper: ClassVar[str] = "arXiv:2403.03507"
    summary: ClassVar[str] = "every weight, moments in a subspace of its gradient"
    formula: ClassVar[str] = "W <- W - lr scale Q Adam(Q^T G), Q the r leading singular vectors of G, renewed every T"
    typical_share: ClassVar[str] = "100 %"
    choose: ClassVar[str] = "When every weight should learn and AdamW's two moments are what does not fit."
    avoid: ClassVar[str] = "When an adapter does: it is smaller. On little data it forgets as full fine-tuning does."
    cost: ClassVar[str] = "A third of AdamW's state at r 1024 on 7B (8-bit: a tenth), one eigh a matrix each T updates."
    evidence: ClassVar[str] = (
        "On a par with full fine-tuning in its paper (arXiv:2403.03507, sec. 5); no independent comparison at equal "
        "tuning is known."
    )
    composes: ClassVar[str] = (
        "Packing, checkpointing, adamw_8bit. No 4-bit base. per_layer: no accumulation, clipping, DDP."
    )
    not_lora_because: ClassVar[str] = "it changes every weight, and the subspace moves: the sum has no low rank"
    # Five times that of full fine-tuning: the root mean square of a projected update is scale * sqrt(r / S) of
    # AdamW's, an eighth at rank 128 of 576, but embeddings and norms take the rate as it is.
    default_learning_rate: ClassVar[float] = 1e-4
    # By a study of 60 updates (docs/compare.md), where the best rate was 1.3e-3 or 4e-4, as good within the noise.
    few_updates_factor: ClassVar[float] = 12.0
    artifact: ClassVar[Literal["adapter", "model"]] = "model"
    keeps_whole_state: ClassVar[bool] = True
    saved_as: ClassVar[Literal["peft", "transformers", "ftune"]] = "transformers"

    name: Literal["galore"] = Field("galore", description="Full training with gradient low-rank projection.")
    rank: int = Field(128, ge=1, description="Rank of the subspace that a matrix's moments live in.")
    update_every: int = Field(200, ge=1, description="Updates between two subspaces (T in the paper).")
    scale: float = Field(0.25, gt=0, description="Factor of the projected update (alpha in the paper).")
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        description="Matrices to project: all-linear (every one in the blocks whose state the rank makes smaller), "
        "a list of names, or a regular expression. All others train with plain AdamW.",
    )
    basis: Literal["eigh", "svd", "randomized"] = Field(
        "eigh",
        description="How the subspace is found. eigh: as exact as svd, and faster. randomized: fastest, captures less.",
    )
    reproject_moments: bool = Field(
        False,
        description="Rotate the moments into a new subspace (LDAdam, arXiv:2410.16103). The paper keeps the numbers.",
    )
    per_layer: bool = Field(
        False,
        description="Update each weight during the backward pass and free its gradient at once. Needs "
        "gradient_accumulation_steps 1 and max_grad_norm null.",
    )
    weights: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="How the weights are kept. bfloat16: half the memory, for gradients too; updates are rounded at "
        "random, so that small ones are not lost.",
    )

    # --- while parsing ---

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield targets, optimizers and portions of an update that cannot work."""
        yield from target_problems(
            self.target_modules, embeddings="embeddings and the output head train with plain AdamW"
        )
        if recipe.optimizer.name.startswith("paged"):
            yield Problem(
                ("optimizer", "name"),
                f"`{recipe.optimizer.name}` pages its own moments; GaLore's are in a subspace, and are not paged",
                f"use `{recipe.optimizer.name.removeprefix('paged_')}`",
            )
        if self.per_layer and (recipe.training.gradient_accumulation_steps or 1) > 1:
            yield Problem(
                ("training", "gradient_accumulation_steps"),
                "`per_layer` updates a weight at once: there is no gradient left to accumulate into",
                "use `gradient_accumulation_steps: 1` with a larger micro_batch_size, or `per_layer: false`",
            )
        if self.per_layer and recipe.training.max_grad_norm is not None:
            yield Problem(
                ("training", "max_grad_norm"),
                "`per_layer` updates a weight before the norm of all gradients is known: it cannot be clipped",
                "use `max_grad_norm: null`, or `per_layer: false`",
            )
        if self.weights == "bfloat16" and recipe.model.dtype == "float32":
            yield Problem(("method", "weights"), *_BFLOAT16_IN_FLOAT32)

    def engine_problems(self, recipe: RecipeView, engine: str) -> Iterator[Problem]:
        """Yield engines that part what GaLore needs in one piece; 8-bit states are its own, and may be parted."""
        if engine == "fsdp2-offload":
            yield Problem(
                ("method", "name"),
                "its moments and bases are whole on the device, and the weights that they update would be on the host",
                "use --engine fsdp2",
            )
        elif engine == "fsdp2" and self.per_layer:
            yield Problem(
                ("method", "per_layer"),
                "`per_layer` updates before the processes have exchanged their gradients",
                "use `per_layer: false`: under fsdp2 each process keeps a part of the gradients anyway",
            )
        if engine.startswith("deepspeed"):
            yield Problem(
                ("method", "name"),
                "a subspace is one of a matrix's gradient, and DeepSpeed hands its optimizer flat parts of many",
                "use --engine fsdp2, or ddp",
            )

    def refusals(self, shape: ModelShape, context: Context) -> Iterator[Problem]:
        """Yield ranks that save nothing on this model, and per-layer updates on several processes."""
        found = self._projected(shape.linears)
        if not found or self.target_modules != "all-linear":
            asked = match_targets(shape.linears, self.target_modules, beside=False)
            useless = [linear for linear in asked if not self._saves(linear)]
            for linear in useless[:1]:
                sides = f"{linear.out_features} x {linear.in_features}"
                yield Problem(
                    ("method", "rank"),
                    f"rank {self.rank} on `{linear.name}` ({sides}) keeps no less state than AdamW",
                    f"use `rank: {_largest_rank(linear)}` or less, or leave it out of `target_modules`",
                )
        if self.per_layer and context.world_size > 1:
            yield Problem(
                ("method", "per_layer"),
                "`per_layer` updates before the processes have exchanged their gradients",
                "use `per_layer: false`, or one process",
            )
        if self.weights == "bfloat16" and str(context.dtype) != "torch.bfloat16":
            yield Problem(("method", "weights"), *_BFLOAT16_IN_FLOAT32)

    def remarks(self, context: Context) -> Iterator[str]:
        """Yield that the subspace is never renewed."""
        if self.update_every >= context.total_steps > 1:
            yield (
                f"one subspace for the whole run: method.update_every is {self.update_every}, and there are "
                f"{context.total_steps} updates"
            )

    def lighter(self) -> Iterator[tuple[str, Self]]:
        """Yield weights in bf16, and with them updates during the backward pass."""
        if self.weights == "float32":
            yield "method.weights: bfloat16", self.model_copy(update={"weights": "bfloat16"})
        if not self.per_layer:
            yield (
                "method.weights: bfloat16 and per_layer: true (with gradient_accumulation_steps: 1, "
                "max_grad_norm: null)",
                self.model_copy(update={"weights": "bfloat16", "per_layer": True}),
            )

    def _saves(self, linear: Linear) -> bool:
        """Whether moments and basis of rank r are smaller than AdamW's two moments."""
        return self.rank <= _largest_rank(linear)

    def _projected(self, linears: Sequence[Linear]) -> list[Linear]:
        found = match_targets(linears, self.target_modules, beside=False)
        return [linear for linear in found if self._saves(linear)]

    # --- building ---

    def base_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """As `weights` says, whatever the model computes in."""
        import torch

        return cast("torch.dtype", getattr(torch, self.weights))

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Let every parameter of the language model require grad."""
        match_targets(list_linears(model), self.target_modules, beside=False)
        # The optimizer is not given the context. An attribute of the Python object: no part of any state_dict.
        object.__setattr__(model, "_ftune_seed", context.seed)
        from ftune.models.language import fixed_parameters

        fixed = fixed_parameters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in fixed)
        return model

    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        """GaLore's AdamW: projected matrices, other matrices, and vectors, which do not decay.

        Raises:
            ModelError: No matrix is projected.
        """
        from ftune.methods._decay import undecayed
        from ftune.methods._galore_optimizer import GaLoreAdamW

        vectors = undecayed(model)
        names = {f"{linear.name}.weight" for linear in self._projected(list_linears(model))}
        if not names:
            raise ModelError(f"rank {self.rank} makes no matrix's state smaller", help="lower method.rank")
        rate = spec.learning_rate or self.default_learning_rate
        # By group: whether it is projected, and whether it decays.
        members: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, True): [], (False, True): [], (False, False): []}
        named = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for parameter, name in named.items():
            members[name in names, name not in vectors and self.decays(name, parameter)].append(parameter)
        groups = [
            {
                "params": parameters,
                "lr": rate,
                "weight_decay": spec.weight_decay * decays,
                "rank": self.rank if projected else None,
            }
            for (projected, decays), parameters in members.items()
            if parameters
        ]
        optimizer = GaLoreAdamW(
            groups,
            betas=spec.betas,
            eps=spec.eps,
            update_every=self.update_every,
            scale=self.scale,
            basis=self.basis,
            reproject_moments=self.reproject_moments,
            bits=bits_of(spec.name),
            seed=getattr(model, "_ftune_seed", 0),
        )
        if self.per_layer:
            optimizer.update_in_backward(named)
        return optimizer

    # --- in the loop ---

    @property
    def updates_in_backward(self) -> bool:
        """With `per_layer`."""
        return self.per_layer

    def gradient_norm(self, trained: Sequence[nn.Parameter], optimizer: Optimizer) -> float:
        """The global norm; with `per_layer` of the gradients that were applied, which are gone."""
        if self.per_layer:
            return cast("GaLoreAdamW", optimizer).take_gradient_norm(trained)
        import torch

        from ftune.ops.sharded import whole

        # Of bf16 gradients torch would give a norm in bf16, and clip by it.
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in trained if p.grad is not None]
        return float(whole(torch.linalg.vector_norm(torch.stack(norms)))) if norms else 0.0

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """What is projected, how often the subspace was renewed, and what the state takes."""
        states = [
            optimizer.state.get(parameter, {})
            for group in optimizer.param_groups
            for parameter in (group["params"] if group["rank"] else ())
        ]
        # The model may have no use of a few, which is told as training begins; they have no state at all.
        if 2 * sum(map(bool, states)) > len(states):
            states = [state for state in states if state]
        used = [state for state in states if "basis" in state]
        state_bytes = cast("GaLoreAdamW", optimizer).state_bytes
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        return {
            "projected_matrices": float(len(states)),
            "matrices_with_basis": float(len(used)),
            "updates": min((float(state["step"]) for state in used), default=0.0),
            "subspaces": min((float(state["refreshes"]) for state in used), default=0.0),
            "captured_energy": sum(float(state["captured"]) for state in used) / max(1, len(used)),
            "state_bytes": float(state_bytes),
            "share_of_adamw_state": state_bytes / (8 * trained),
        }

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """No matrix projected, a subspace missing or not renewed, or a state that is no smaller than AdamW's."""
        missing = vitals["projected_matrices"] - vitals["matrices_with_basis"]
        due = math.ceil(vitals["updates"] / self.update_every)
        if not vitals["projected_matrices"]:
            return "no matrix is projected: this is plain AdamW"
        if missing:
            return f"{missing:.0f} of the projected matrices never got a subspace"
        if vitals["subspaces"] != due:
            return f"a subspace was computed {vitals['subspaces']:.0f} times, and {due} were due"
        if not 0 < vitals["share_of_adamw_state"] < 1:
            return f"its state takes {vitals['share_of_adamw_state']:.0%} of AdamW's: nothing is saved"
        return None

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        times = f"{vitals['subspaces']:.0f} time{'s' * (vitals['subspaces'] != 1)}"
        state = f"{vitals['state_bytes'] / 2**20:,.1f} MiB, {vitals['share_of_adamw_state']:.0%} of AdamW's"
        return (
            f"{vitals['projected_matrices']:.0f} matrices projected to rank {self.rank} "
            f"({vitals['captured_energy']:.1%} of the gradient's energy), subspace computed {times}, "
            f"optimizer state {state}"
        )

    # --- what it leaves behind ---

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a whole transformers model into ``out``, in the dtype the recipe computes in."""
        from ftune.models.whole import save_whole_model

        save_whole_model(model, out, context.dtype)

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Copy the saved weights over the base model's."""
        from ftune.models.whole import load_whole_model

        return load_whole_model(base, directory).requires_grad_(False)

    def merge(self, model: nn.Module, context: Context) -> nn.Module:
        """The model is already whole: return it in fp32."""
        return model.float()

    # --- arithmetic ---

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Everything."""
        return shape.parameters - shape.fixed

    def products(self, shape: ModelShape) -> int:
        """For the gradients of the weights."""
        return different(shape.linears)

    def adapter_bytes(self, shape: ModelShape) -> int:
        """None: what is trained is the base model itself."""
        return 0

    def gradient_bytes(self, shape: ModelShape) -> int:
        """Of every weight, in its dtype; with `per_layer` of the largest alone.

        A tied embedding gets a gradient as the head and another as the embedding, at the two ends of the backward
        pass: the first is held until the second is there.
        """
        size = 2 if self.weights == "bfloat16" else 4
        if not self.per_layer:
            return size * shape.parameters
        tied = shape.embedding if not shape.head else 0
        return size * (tied + self._largest(shape))

    def optimizer_bytes(self, shape: ModelShape, optimizer: str) -> int:
        """Of moments and bases: the projected matrices', the other matrices', the vectors'."""
        bits, projected = bits_of(optimizer), self._projected(shape.linears)
        vectors = int(shape.extra.get("vectors", shape.norms))
        linears = sum(linear.elements for linear in shape.linears)
        others = [linear.elements for linear in shape.linears if linear not in projected]
        others += [shape.embedding, shape.head, shape.parameters - linears - shape.embedding - shape.head - vectors]
        total = 2 * 4 * vectors + sum(2 * tensor_bytes(elements, bits) for elements in others)
        for linear in projected:
            total += 2 * tensor_bytes(self.rank * max(linear.in_features, linear.out_features), bits)
            total += tensor_bytes(self.rank * min(linear.in_features, linear.out_features), bits)
        return total

    @property
    def whole_state(self) -> bool:
        """A subspace is one of a whole gradient."""
        return True

    def update_bytes(self, shape: ModelShape, optimizer: str) -> int:
        """Temporaries in fp32 of one update: of a piece that is not projected, or of the largest matrix that is.

        Of both direction; weight, gradient and noise; moments and their indices, which a subspace has fewer of.
        """
        from ftune.methods._galore_optimizer import PIECE

        narrow, low = 3 * (self.weights == "bfloat16"), 5 * (bits_of(optimizer) == 8)
        projected = self._projected(shape.linears)
        plain = max(shape.embedding, shape.head, *(each.elements for each in shape.linears if each not in projected), 0)
        within = max((self.rank * max(each.in_features, each.out_features) for each in projected), default=0)
        largest = max((each.elements for each in projected), default=0)
        return 4 * max((1 + narrow + low) * min(PIECE, plain), (2 + narrow) * largest + low * within)

    def _largest(self, shape: ModelShape) -> int:
        """Elements of the largest parameter."""
        return max(shape.embedding, shape.head, *(linear.elements for linear in shape.linears))


_BFLOAT16_IN_FLOAT32 = (
    "bfloat16 weights cannot compute in float32: there is no autocast to a larger dtype",
    "set `model.dtype: bfloat16`, or `weights: float32`",
)


def _largest_rank(linear: Linear) -> int:
    """The largest rank r at which ``r (2 L + S) < 2 L S`` for longer side L and shorter side S."""
    shorter, longer = sorted((linear.in_features, linear.out_features))
    return (2 * longer * shorter - 1) // (2 * longer + shorter)
