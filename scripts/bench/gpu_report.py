"""The page's part on GPUs, as a pure function of its figures."""

from __future__ import annotations

from typing import Any

from gpu_cases import BATCH, PAPER, TITLES, Case
from table import table

GIB = 2**30
SHIFTED = ("s2", "longlora")
Result = dict[str, Any]

NO_GPU = """
## On a GPU

No GPU was at hand when this page was made, so nothing here was measured on one. `make bench-gpu` trains Llama-3-8B
shapes with every method at 2k, 8k and 32k tokens a row, and TRL and Unsloth beside LoRA and QLoRA, and puts what it
measured here.
"""

HEAD = """
## On a GPU

{device}, {date}; `make bench-gpu`. The model has the sizes of {name} ({parameters:,} parameters) and **random**
weights (normal, standard deviation {std}, in bf16): time and memory do not depend on them, and no quality is claimed.
An update is {batch} rows of so many tokens, one after another; half of each is in the loss. {updates} updates, eight
times as many of rows of 2,048 tokens or fewer; the first half of them is not counted. LoRA of rank {rank} on all linear
layers but the head, unless said. CUDA graphs: whether ftune replayed blocks from them, which it does where the GPU
waits for Python. Memory is what the allocator gave out at most from the first update on; `used` is the
growth of what nvidia-smi reports, which has the context and what the allocator keeps as well. The prediction is
compared without the state of a paged optimizer, which the allocator does not see. Cases of `make bench-gpu` that have
no row here were not run.

"""

EAGER = "ftune's fused kernels, which `ftune.ops.fused` has for norms, gates, positions and the loss, were not in force"

SETTINGS = f"""
`galore` keeps weights in bf16 and moments in 8 bits, of rank a quarter of the width, in subspaces found by sketches
(`basis: randomized`); `longlora` is the paper's:
attention only, rank 8, embeddings and norms trained whole. `{TITLES["s2"]}` is `lora` in everything but attention.
`{TITLES[PAPER]}`: rank 64, the paged optimizer, recomputation. Recomputed: blocks that run a second
time, as few as fit: where it is more than none and less than all, the peak is what the device has, not what is needed.
"""

PEERS = """
### Beside other tools

The same rows directly after ftune's run, where no note says otherwise. A tool trains without gradient checkpointing
where that fits. The first loss must be ftune's within 1 %, and as many parameters train, else there is no ratio: with
random weights every token costs about ln(vocabulary) and half the variance of the logits, so that shows the same rows,
mean and scale, and little of the rest; that is what the comparison on a real model above is for. TRL keeps QLoRA's
adapters in bf16, ftune in fp32.

"""

S2 = """
### Shifted sparse attention against full attention

LongLoRA's groups over plain LoRA at the same length, every block recomputed in both; below 1 is better.

"""

ARITHMETIC = """
### QLoRA's claim, by arithmetic

The paper tunes Llama-65B on one GPU of 48 GB: NF4 with double quantization, rank {rank} on all linear layers, a paged
optimizer, rows of {length} tokens one at a time, every block recomputed. This is the estimate of `ftune plan` for a
CUDA device ({gib:.0f} GiB) that need not be there: `python scripts/bench/arithmetic.py`. State that a paged optimizer
may move to the host is counted as if it stayed. Not measured at this size{measured}.

"""


def section(arithmetic: dict[str, Any], gpu: dict[str, Any] | None) -> str:
    """Everything about GPUs: the measurements or that there are none, and the arithmetic."""
    return (NO_GPU if gpu is None else _measured(gpu)) + _arithmetic(arithmetic, gpu)


def _measured(gpu: dict[str, Any]) -> str:
    model, work = gpu["model"], gpu["work"]
    gpu = gpu | {"results": [_noted(result, gpu["cuda"]) for result in gpu["results"]]}
    ours = [result for result in gpu["results"] if result["tool"] == "ftune"]
    notes = list(dict.fromkeys(result["note"] for result in gpu["results"] if "note" in result))
    parts = [
        HEAD.format(
            device=gpu["device"],
            date=gpu["date"],
            name=model["name"],
            parameters=model["parameters"],
            std=model["std"],
            batch=BATCH,
            updates=work["updates"],
            rank=work["rank"],
        ),
        _methods(ours, gpu["cuda"], notes),
        SETTINGS,
    ]
    if len(ours) < len(gpu["results"]):
        parts += [PEERS, _peers(gpu, notes)]
    if rows := _attention(ours):
        parts += [S2, table(["tokens a row", "", "over", "step time", "peak memory"], rows)]
    parts += [f"\n({i}) {note}.\n" for i, note in enumerate(notes, start=1)]
    versions = [
        f"- {tool['title']}: {', '.join(f'{name} {version}' for name, version in tool['versions'].items())}.\n"
        for tool in gpu["tools"].values()
    ]
    absent = [f"- {title} is not in the table: {why}.\n" for title, why in gpu["absent"].items()]
    return "".join([*parts, "\n", *versions, *absent])


def ratio(result: Result, cuda: bool) -> float | None:
    """Predicted over measured; on CUDA without a paged state, which lies in memory that the allocator does not see."""
    if result["status"] != "ok" or "predicted" not in result:
        return None
    unseen = result["predicted"]["optimizer"] if cuda and "Paged" in result["optimizer"] else 0
    return float((result["predicted"]["total"] - unseen) / result["peak_bytes"])


def _methods(results: list[Result], cuda: bool, notes: list[str]) -> str:
    columns = ["method", "tokens a row", "documents", "attention", "recomputed", "CUDA graphs", "tokens/s"]
    rows = []
    for result in results:
        case = Case(**result["case"])
        share = ratio(result, cuda)
        blocks = f"{result['recomputed_blocks']} of {result['blocks']}" if "blocks" in result else "-"
        blocks += ", where `auto` ran out of memory" if "auto" in result else ""
        predicted = "-" if "predicted" not in result else f"{result['predicted']['total'] / GIB:.1f} GiB predicted"
        rows.append(
            [
                TITLES.get(case.method, case.method) + _mark(result, notes),
                f"{case.length:,}",
                str(case.documents),
                "in shifted groups" if case.method in SHIFTED else result.get("attention", case.attention),
                blocks,
                "yes" if (result.get("graphs") or {}).get("replayed_micro_batches") else "no",
                *_figures(result),
                predicted if share is None else f"{share:.2f}",
            ]
        )
    return table([*columns, "first update s", "peak GiB", "used GiB", "predicted / measured"], rows)


def _noted(result: Result, cuda: bool) -> Result:
    """With a note, where it has none, that a run of ftune on a GPU went without its kernels."""
    return {"note": EAGER} | result if cuda and result.get("kernels") == "eager" else result


def _mark(result: Result, notes: list[str]) -> str:
    """The number of what is to be said of a result, such as that it is older than its neighbours."""
    return f" ({notes.index(result['note']) + 1})" if "note" in result else ""


def _figures(result: Result) -> list[str]:
    """Speed, first update, peak and used memory, or what became of it."""
    if result["status"] != "ok":
        why = "" if result["status"] == "out of memory" else f": {result['reason'].replace('|', '/')}"
        return [f"**{result['status']}**{why}", "-", "-", "-"]
    return [
        f"{result['tokens_per_second']:,.0f}",
        f"{result['first_step_seconds']:.1f}",
        f"{result['peak_bytes'] / GIB:.1f}",
        "-" if result["device_peak_bytes"] is None else f"{result['device_peak_bytes'] / GIB:.1f}",
    ]


def _peers(gpu: dict[str, Any], notes: list[str]) -> str:
    ours = {Case(**result["case"]): result for result in gpu["results"] if result["tool"] == "ftune"}
    rows = []
    for result in gpu["results"]:
        case = Case(**result["case"])
        if result["tool"] == "ftune":
            continue
        mine = ours.get(case, {"status": "not run"})
        ratios = ["-", "-"]
        if result.get("agrees") and mine["status"] == "ok":
            ratios = [
                f"**{mine['tokens_per_second'] / result['tokens_per_second']:.2f}**",
                f"**{mine['peak_bytes'] / result['peak_bytes']:.2f}**",
            ]
        loss = "-"
        if result["status"] == "ok":
            loss = f"{result['first_loss']:.3f}"
            if "first_loss" in mine:
                loss += f" (ftune {mine['first_loss']:.3f}{'' if result['agrees'] else ': DIFFERS'})"
        rows.append(
            [
                gpu["tools"][result["tool"]]["title"] + _mark(result, notes),
                TITLES.get(case.method, case.method),
                f"{case.length:,}",
                result.get("attention", "-"),
                "on" if result["checkpointing"] else "off",
                *_figures(result),
                loss,
                *ratios,
            ]
        )
    columns = ["tool", "method", "tokens a row", "attention", "checkpointing", "tokens/s", "first update s"]
    return table(
        [*columns, "peak GiB", "used GiB", "first loss", "ftune's speed over it", "ftune's peak over it"], rows
    )


def _attention(results: list[Result]) -> list[list[str]]:
    """S2 against full attention: LoRA's settings in both, and LongLoRA as the paper has it."""
    found = {Case(**result["case"]): result for result in results}
    rows = []
    for case, result in found.items():
        full = found.get(Case("lora", case.length, recompute=True))
        if case.method not in SHIFTED or not case.recompute or full is None:
            continue
        ratios = ["-", "-"]
        if result["status"] == full["status"] == "ok":
            ratios = [
                f"**{result['step_seconds'] / full['step_seconds']:.2f}**",
                f"**{result['peak_bytes'] / full['peak_bytes']:.2f}**",
            ]
        else:
            ratios = [f"{result['status']} against {full['status']}", "-"]
        rows.append([f"{case.length:,}", TITLES.get(case.method, case.method), "lora", *ratios])
    return rows


def _arithmetic(arithmetic: dict[str, Any], gpu: dict[str, Any] | None) -> str:
    paper = [r for r in (gpu or {"results": []})["results"] if r["case"]["method"] == PAPER and r["status"] == "ok"]
    measured = ""
    if gpu is not None and paper:
        measured = f"; the 8B model in the same setting was, at {ratio(paper[0], gpu['cuda']):.2f} predicted / measured"
    columns = ["shape", "method", "optimizer", "weights", "adapters", "gradients", "state", "the rest", "total GiB", ""]
    rows = []
    for row in arithmetic["rows"]:
        size = {name: value / GIB for name, value in row["bytes"].items()}
        named = [size[name] for name in ("weights", "adapters", "gradients", "optimizer")]
        rows.append(
            [
                row["shape"],
                row["method"],
                row["optimizer"],
                *(f"{value:,.1f}" for value in named),
                f"{size['total'] - sum(named):,.1f}",
                f"{size['total']:,.1f}",
                "fits" if row["fits"] else "does not fit",
            ]
        )
    head = ARITHMETIC.format(
        rank=arithmetic["rank"],
        length=arithmetic["length"],
        gib=arithmetic["device_bytes"] / GIB,
        measured=measured,
    )
    return head + table(columns, rows)
