"""The objective: a batch in, the sum of its token losses out.

One module holds model, head and loss, because under DDP every parameter must be used inside ``forward``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftune.models.head import plain_head
from ftune.ops.cross_entropy import chunked_cross_entropy, linear_cross_entropy
from ftune.run.fused_loss import fused_cross_entropy, fused_pays
from ftune.run.head import AfterHead, HeadTap, autocast, measure_after_head

if TYPE_CHECKING:
    from ftune.data.batches import Batch

__all__ = ["Objective", "autocast"]


class Objective(nn.Module):
    """The causal language-modelling loss, summed over target tokens.

    The logits never exist at once: the model's head is tapped for its input, and head and cross-entropy are computed
    in chunks (``ftune.ops.cross_entropy``). What the model would do to its logits after the head, a scale or a soft
    cap, is measured on the model itself. A model whose logits come about otherwise is asked for them whole.

    Args:
        model: A transformers causal model, adapted or not.
        dtype: What it computes in; the loss itself is always fp32.
        flat: Whether a batch is best one row of documents: attention keeps them apart without a mask.

    Attributes:
        fused: Whether Liger's kernel computes the loss of a plain head.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, flat: bool = False) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.flat = flat
        self.fused = False
        self._after_head: AfterHead | None = None
        self._measured = False

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropies of the batch's target tokens: fp32, shape ().

        A label at position i is predicted from position i - 1. The head runs only on positions that predict a
        target; labels of -100 are no targets. A batch without targets gives 0 with a graph, so that ranks that ran
        out of data still take part in the gradient exchange.
        """
        return self._compute(batch, {"use_cache": False})

    def read(self, batch: Batch, cache: Any) -> Tensor:
        """The same of a batch that stands behind what a cache of transformers holds; the cache then holds it too.

        The batch's first tokens are no targets.
        """
        return self._compute(batch, {"use_cache": True, "past_key_values": cache})

    def _compute(self, batch: Batch, how: dict[str, Any]) -> Tensor:
        targets_BK = batch.labels[:, 1:][:, batch.predicting]
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, **how}
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids
        # Counted from the end: prompt tuning puts its own positions in front.
        inputs["logits_to_keep"] = batch.predicting - batch.input_ids.shape[1]
        after_head = self._measure_head(batch.input_ids.device)
        if after_head is None:
            with autocast(self.dtype, batch.input_ids.device.type):
                logits_BKV = self.model(**inputs).logits
            return F.cross_entropy(
                logits_BKV.float().flatten(0, 1), targets_BK.flatten(), ignore_index=-100, reduction="sum"
            )
        with autocast(self.dtype, batch.input_ids.device.type), HeadTap(self.model) as tap:
            self.model(**inputs)
        return self._loss(tap, after_head, targets_BK, batch.target_tokens)

    def _loss(self, tap: HeadTap, after_head: AfterHead, targets_BK: Tensor, target_tokens: int) -> Tensor:
        hidden_BKD, head = tap.hidden, tap.head
        if target_tokens == targets_BK.numel():  # as in one row; a mask's count would be waited for
            hidden_ND, targets_N = hidden_BKD.flatten(0, 1), targets_BK.flatten()
        else:
            is_target_BK = targets_BK != -100
            hidden_ND, targets_N = hidden_BKD[is_target_BK], targets_BK[is_target_BK]
        device = hidden_BKD.device.type
        if (plain := plain_head(self.model)) is not None:
            # As autocast would for the head's product, which has no part in the loss's own precision.
            low_ND = hidden_ND if self.dtype == torch.float32 else hidden_ND.to(self.dtype)
            with torch.autocast(device, enabled=False):
                linear = fused_cross_entropy if self.fused else linear_cross_entropy
                loss = linear(
                    low_ND, plain.weight, targets_N, plain.bias, scale=after_head.scale, softcap=after_head.softcap
                )
        else:
            with autocast(self.dtype, device):
                loss = chunked_cross_entropy(
                    lambda hidden_CD: after_head(head(hidden_CD)), hidden_ND, targets_N, vocab=after_head.vocab
                )
        # Without targets the hidden states keep the graph alive.
        return loss if targets_N.numel() else loss + 0.0 * hidden_BKD.sum()

    def fused_pays(self, positions: int, device: torch.device) -> bool:
        """Whether Liger's kernel is the better one for this model's head (``ftune.run.fused_loss``).

        positions: Targets in a micro-batch.
        """
        after_head = self._measure_head(device)
        if after_head is None:
            return False
        plain = plain_head(self.model)
        return plain is not None and fused_pays(plain, after_head, self.dtype, positions)

    def _measure_head(self, device: torch.device) -> AfterHead | None:
        if not self._measured:
            self._after_head = measure_after_head(self.model, self.dtype, device)
            self._measured = True
        return self._after_head
