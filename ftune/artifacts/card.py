"""The model card: ``README.md`` beside the adapter, with what was trained on what and how it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ftune.scrub import scrub_data

__all__ = ["write_card"]


def write_card(directory: Path, record: dict[str, Any], auto: str = "AutoModelForCausalLM") -> None:
    """Write the card of a run.

    Names the base model and the data as the recipe does, but of a local path its last component only.

    Args:
        directory: The adapter's or model's directory.
        record: What ``run.json`` keeps.
        auto: The class of transformers that loads the base model.
    """
    record = scrub_data(record)
    plan, measured, resolved = record["plan"], record["measured"], record["resolved"]
    method, data, training = plan["method"], plan["data"], plan["training"]
    base = plan["model"]["public_name"]
    front: dict[str, Any] = {"library_name": method["saved_as"]}
    if "/" in base and "://" not in base:  # a hub id; of a local path only the last part is public
        front["base_model"] = base
    front["tags"] = ["ftune", method["name"]]
    rows = [
        ("Base model", base),
        ("Method", f"{method['name']} ({_settings(method['settings'])})" if method["settings"] else method["name"]),
        ("Trained parameters", f"{method['trainable']:,} ({method['share']:.2%})"),
        ("Data", f"{_public(resolved['data']['train']['path'])}: {data['examples']:,} examples, "
                 f"{data['tokens']:,} tokens, {data['target_tokens']:,} of them in the loss"),
        ("Updates", f"{training['steps']:,} of {training['global_batch']} rows, {training['epochs']:.2g} epochs"),
        ("Learning rate", f"{training['learning_rate']:g}, {training['schedule']}, {training['optimizer']}"),
        ("Training loss", _number(measured.get("first_loss")) + " → " + _number(measured.get("loss"))),
        ("Held-out loss", _number(measured.get("base_loss")) + " → " + _number(measured.get("held_out_loss"))),
        ("Seed", str(record["seed"])),
        ("Computed in", f"{plan['model']['dtype']} on {record['device']['name']}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    title = f"{base.rsplit('/', 1)[-1]}, tuned by {method['name']}"
    how = _how_to_load(method["saved_as"], base, resolved.get("model", {}), auto)
    (directory / "README.md").write_text(
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n"
        f"Made with ftune. {how}\n\n| | |\n|---|---|\n{table}\n",
        encoding="utf-8",
    )


def _public(path: str) -> str:
    """The name of a data source without the place it has on this machine: hub names as they are."""
    local = Path(path).expanduser()
    return local.name if local.exists() or local.is_absolute() or local.suffix else path


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items() if value not in (None, False, 0.0))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _how_to_load(saved_as: str, base: str, model: dict[str, Any], auto: str) -> str:
    if saved_as == "ftune":
        return f"Use it with `ftune eval RUN` and `ftune chat RUN`, over `{base}`."
    trusted = ", trust_remote_code=True" if model.get("trust_remote_code") else ""
    if saved_as == "transformers":
        lines = [f"from transformers import {auto}", "", f'model = {auto}.from_pretrained("DIRECTORY"{trusted})']
    else:
        asked = "".join(f', {key}="{model[key]}"' for key in ("revision", "gguf_file") if model.get(key))
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("{base}"{asked}{trusted})',
            'model = PeftModel.from_pretrained(model, "DIRECTORY")',
        ]
    return "\n".join(["Load it with", "", "```python", *lines, "```"])
