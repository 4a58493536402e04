"""Train with TRL's SFTTrainer or Unsloth and print, as one line of JSON, what ftune's own runs say of themselves.

    python scripts/bench/sft_peer.py CONFIG.yaml     # in the tool's environment

The times are those from the end of one update to the end of the next, and the peak is that of the allocator from
the first update on, both as ftune takes them.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from typing import Any

from sft_shared import make_trainer, read_settings, unsloth_model

MARK = "measured: "


def _trl(settings: dict[str, Any], attention: str) -> tuple[Any, Any, Any]:
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings["dtype"]),
    )
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"],
        dtype=getattr(torch, settings["dtype"]),
        attn_implementation=attention,
        device_map={"": 0 if settings["cuda"] else "cpu"},
        quantization_config=quantization if settings["four_bit"] else None,
    )
    adapter = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return model, AutoTokenizer.from_pretrained(settings["model"]), adapter


def main(path: str) -> None:
    settings = read_settings(path)
    if settings["tool"] == "unsloth":
        import unsloth  # noqa: F401  # isort: skip  # must come first: it patches what follows
    import torch
    from transformers import TrainerCallback

    attention = "flash_attention_2" if settings["cuda"] and find_spec("flash_attn") else "sdpa"
    found: dict[str, Any] = {"seconds": [], "losses": [], "tokens": [], "attention": attention}

    class Watch(TrainerCallback):
        last = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if settings["cuda"]:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.last = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if settings["cuda"]:
                torch.cuda.synchronize()
            now = time.perf_counter()
            found["seconds"].append(now - self.last)
            self.last = now

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                found["losses"].append(float(logs["loss"]))
                found["tokens"].append(logs.get("num_tokens"))

    adapter = None
    if settings["tool"] == "unsloth":
        found["attention"] = "its own choice"
        model, tokenizer = unsloth_model(settings)
    else:
        model, tokenizer, adapter = _trl(settings, attention)
    trainer = make_trainer(settings, model, tokenizer, adapter, [Watch()])
    trainer.train()
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if settings["cuda"] else None
    found["trainable"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print("\n" + MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
