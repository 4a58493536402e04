"""The other tools: what is installed, their best settings, their command, and how their log is read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from job import ALPHA, LEARNING_RATE, RANK, SEED, Job, Phase, Tool, write_yaml


def trainer_settings(job: Job) -> dict[str, Any]:
    """What everything on the trainer of transformers understands."""
    return {
        "bf16": job.bfloat16,
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "max_steps": job.updates,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "output_dir": str(job.out / "run"),
    }


def _read_trainer(job: Job, log: str) -> Phase:
    losses = re.findall(r"\{'loss': '?([\d.]+)", log)
    seconds = re.findall(r"'train_runtime': '?([\d.]+)", log)
    if not losses or not seconds:
        raise LookupError(f"no loss or train_runtime in the log of {job.out}")
    return Phase(float(seconds[-1]), float(losses[0]))


def _trl(job: Job, bin_directory: Path) -> list[str]:
    settings = {
        "model_name_or_path": str(job.model),
        "dtype": job.dtype,
        "datasets": [{"path": "json", "data_files": str(job.data / f"{job.split}.pairs.jsonl")}],
        "use_cpu": not job.cuda,
        "use_peft": True,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "max_length": job.max_length,
        "gradient_checkpointing": False,
        **trainer_settings(job),
    }
    return [str(bin_directory / "trl"), "sft", "--config", write_yaml(job, settings)]


def _llamafactory(job: Job, bin_directory: Path) -> list[str]:
    settings = {
        "model_name_or_path": str(job.model),
        "template": "smollm2",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "dataset_dir": str(job.data),
        "dataset": job.split,
        "cutoff_len": job.max_length,
        "use_cpu": not job.cuda,
        "disable_gradient_checkpointing": True,
        **trainer_settings(job),
    }
    return [str(bin_directory / "llamafactory-cli"), "train", write_yaml(job, settings)]


def _without_cuda_libraries(bin_directory: Path) -> None:
    """Take out what loads CUDA's libraries when imported and is not needed for text: torchvision, torchaudio's core."""
    subprocess.run([str(bin_directory / "python"), "-m", "pip", "uninstall", "-qy", "torchvision"], check=True)
    for library in bin_directory.parent.glob("lib/python*/site-packages/torchaudio/lib/*.so"):
        library.unlink()


def _litgpt_checkpoint(job: Job, bin_directory: Path) -> Path:
    """Convert the model to litgpt's format once; the directory's name tells it the architecture."""
    model, directory = job.model, bin_directory.parents[1] / "checkpoint" / job.dtype / job.model.name
    if not (directory / "lit_model.pth").exists():
        directory.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            shutil.copyfile(file, directory / file.name)
        subprocess.run([str(bin_directory / "litgpt"), "convert_to_litgpt", str(directory)], check=True)
    return directory


def _litgpt(job: Job, bin_directory: Path) -> list[str]:
    data = job.out / "data"
    data.mkdir()
    rows = json.loads((job.data / f"{job.split}.json").read_text(encoding="utf-8"))
    (data / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    # It validates on this before training; one short example keeps that out of the figures.
    (data / "val.json").write_text(json.dumps(rows[:1]), encoding="utf-8")
    settings = {
        "checkpoint_dir": str(_litgpt_checkpoint(job, bin_directory)),
        "out_dir": str(job.out / "run"),
        "precision": "bf16-true" if job.bfloat16 else "32-true",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        **{f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")},
        "lora_head": False,
        "data": {
            "class_path": "litgpt.data.JSON",
            "init_args": {
                "json_path": str(data),
                "mask_prompt": True,
                "prompt_style": "smollm2",
                "num_workers": 0,
            },
        },
        "train": {
            "global_batch_size": job.batch,
            "micro_batch_size": job.micro_batch,
            "lr_warmup_steps": 1,  # 0 crashes
            "epochs": job.updates + 1,
            "max_steps": job.updates,
            "max_seq_length": job.max_length,
            "save_interval": 1000,
            "log_interval": 1,
        },
        "eval": {"interval": 1000, "max_iters": 1, "initial_validation": False, "final_validation": False},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": LEARNING_RATE, "weight_decay": 0.0}},
        "logger_name": "csv",
        "seed": SEED,
    }
    return [str(bin_directory / "litgpt"), "finetune_lora", "--config", write_yaml(job, settings)]


def _read_litgpt(job: Job, log: str) -> Phase:
    """Sum its times of single micro-batches; its loss is a running mean over one update's."""
    found = re.findall(r"step (\d+) \| loss train: ([\d.]+),.*iter time: ([\d.]+) ms( \(step\))?", log)
    ends = [float(loss) for _, loss, _, step in found if step]
    if not ends:
        raise LookupError(f"no finished step in the log of {job.out}")
    return Phase(sum(float(milliseconds) for _, _, milliseconds, _ in found) / 1000, ends[0])


def _axolotl(job: Job, bin_directory: Path) -> list[str]:
    settings = {
        "base_model": str(job.model),
        "datasets": [
            {
                "path": str(job.data / f"{job.split}.messages.jsonl"),
                "type": "chat_template",
                "field_messages": "messages",
                "roles_to_train": ["assistant"],
                "train_on_eos": "turn",
            }
        ],
        "adapter": "lora",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "sequence_len": job.max_length,
        "sample_packing": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        "optimizer": "adamw_torch",
        "val_set_size": 0,
        "dataset_prepared_path": str(job.out / "prepared"),
        "micro_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "max_steps": job.updates,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": job.bfloat16,
        "seed": SEED,
        "output_dir": str(job.out / "run"),
    }
    return [str(bin_directory / "axolotl"), "train", write_yaml(job, settings)]


def _unsloth(job: Job, bin_directory: Path) -> list[str]:
    settings = {
        "model": str(job.model),
        "data": str(job.data / f"{job.split}.pairs.jsonl"),
        "cuda": job.cuda,
        "dtype": job.dtype,
        "four_bit": False,
        "checkpointing": False,
        "max_length": job.max_length,
        "rank": RANK,
        "alpha": ALPHA,
        "trainer": trainer_settings(job),
    }
    script = Path(__file__).with_name("unsloth_sft.py")
    return [str(bin_directory / "python"), str(script), write_yaml(job, settings)]


PEERS = {
    "trl": Tool(
        "TRL",
        ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0", "accelerate==1.15.0"),
        _trl,
        _read_trainer,
        ("token", "with_rest"),
    ),
    "llamafactory": Tool(
        "LLaMA-Factory",
        ("llamafactory==0.9.5", "torchaudio==2.11.0"),
        _llamafactory,
        _read_trainer,
        ("token", "with_rest"),
        mend=_without_cuda_libraries,
    ),
    "litgpt": Tool(
        "litgpt",
        ("litgpt==0.5.13", "requests==2.34.2"),
        _litgpt,
        _read_litgpt,
        ("document", "to_end_of_turn"),
        "adapters in the base's dtype; an update is the mean of its documents' means; saving writes the merged model, "
        "too",
        check_updates=2,  # its cosine divides by the updates after the warm-up
    ),
    "unsloth": Tool(
        "Unsloth",
        ("unsloth==2026.10.9",),
        _unsloth,
        _read_trainer,
        ("token", "with_rest"),
        "imports on a GPU only",
        cuda_only=True,
    ),
    "axolotl": Tool(
        "axolotl",
        ("axolotl==0.19.0",),
        _axolotl,
        _read_trainer,
        ("token", "to_end_of_turn"),
        "refuses bf16 on a CPU",
        cuda_only=True,
        python="python3.12",
    ),
}

ABSENT = {
    "torchtune": "0.6.1, the last, has no chat tokenizer for this model and does not import beside torchao 0.18",
    "Ludwig": "0.11.0 imports torchvision and torchaudio, whose published wheels load CUDA's libraries",
}
"""Tools that could not be made to run, and why."""
