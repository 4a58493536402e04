"""QLoRA's claim by arithmetic: what fine-tuning 65B takes, on a device that need not be there.

    python scripts/bench/arithmetic.py     # writes docs/figures/arithmetic.json

The paper (arXiv:2305.14314) tunes Llama-65B "on a single 48GB GPU": NF4 with double quantization, rank 64 on all
linear layers, a paged optimizer, rows of 512 tokens one at a time, gradient checkpointing. ``ftune plan`` plans for
the device that it runs on, so this calls the estimate behind it for CUDA. The 8B model in the same setting is what
``gpu.py`` measures, as `qlora-paper`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs/figures/arithmetic.json"
DEVICE_BYTES = 48 * 2**30
RANK = 64
LENGTH = 512
ROWS = (
    ("llama-65b", "qlora", "paged_adamw"),
    ("llama-65b", "qlora", "paged_adamw_8bit"),
    ("llama-65b", "lora", "adamw"),
    ("llama-65b", "full", "adamw"),
    ("llama-3-8b", "qlora", "paged_adamw"),
)


def compute() -> dict[str, Any]:
    """Every row's bytes, item by item, and whether they fit."""
    from transformers import AutoConfig

    from ftune.available import on_empty_gpu
    from ftune.memory.estimate import estimate
    from ftune.memory.request import Request
    from ftune.methods import METHODS
    from ftune.plan.shapes import read_shape

    names = dict.fromkeys(shape for shape, _, _ in ROWS)
    shapes = {name: read_shape(AutoConfig.from_pretrained(ROOT / "ftune/shapes" / name)) for name in names}
    rows = []
    for name, method, optimizer in ROWS:
        request = Request(
            method=METHODS[method](**({} if method == "full" else {"rank": RANK})),
            shape=shapes[name],
            optimizer=optimizer,
            dtype_bytes=2,
            rows=1,
            length=LENGTH,
            target_tokens=LENGTH,
            recomputed_blocks=shapes[name].layers,
            attention="sdpa",
            device_type="cuda",
            packed=False,
        )
        memory = estimate(request)
        rows.append(
            {
                "shape": name,
                "parameters": shapes[name].parameters,
                "method": method,
                "optimizer": optimizer,
                "bytes": memory.as_dict(),
                "fits": memory.total <= on_empty_gpu(DEVICE_BYTES),
            }
        )
    return {"device_bytes": DEVICE_BYTES, "rank": RANK, "length": LENGTH, "rows": rows}


if __name__ == "__main__":
    FIGURES.write_text(json.dumps(compute(), indent=2) + "\n", encoding="utf-8")
