"""The measurement on a GPU: its cases, its random model, its readers and its page, on a CPU and tiny sizes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from bench_scripts import DIRECTORY, imported
from transformers import AutoModelForCausalLM, LlamaConfig

from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of
from ftune.recipe import load_checked

MODULES = ("arithmetic", "gpu", "gpu_cases", "gpu_peers", "gpu_report", "job", "measure", "random_model", "report")
METHODS = ("lora", "qlora", "dora", "galore", "longlora", "s2", "qlora-paper")
LENGTH = 256


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    with imported(*MODULES) as modules:
        yield modules


def sizes(where: Path, **changes: Any) -> Path:
    """A directory with the configuration of a tiny model whose context is shorter than the rows."""
    settings = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    config = LlamaConfig(**settings | {"tie_word_embeddings": False} | changes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def model(bench, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("random")
    bench["random_model"].write(sizes(where / "sizes"), where / "model", context=512)
    return where / "model"


@pytest.fixture
def recipe_of(bench, model, tmp_path):
    """A function from a case to its recipe, checked as `ftune train` checks it."""

    def make(case: Any) -> Any:
        cases, rows, path = bench["gpu_cases"], tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
        cases.write_rows(rows, json.loads((model / "words.json").read_text()), case, 3)
        path.write_text(yaml.safe_dump(cases.recipe(case, model, rows, 3, 64, tmp_path / "run")))
        return load_checked(path, [])[0].recipe

    return make


# --- the model ---


def test_the_random_model_is_a_plain_one_of_these_sizes(model) -> None:
    loaded, report = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.max_position_embeddings == 512
    assert loaded.config.eos_token_id == 2
    facts = json.loads((model / "random.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in loaded.parameters())
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.bfloat16
        if parameter.ndim == 1:
            assert bool((parameter == 1).all()), name
        else:
            assert float(parameter.detach().float().std()) == pytest.approx(0.02, rel=0.05), name
    assert not torch.equal(loaded.model.layers[0].mlp.up_proj.weight, loaded.model.layers[1].mlp.up_proj.weight)


def test_shards_hold_the_same_weights_and_a_tied_head_is_stored_once(bench, tmp_path) -> None:
    tied = sizes(tmp_path / "sizes", tie_word_embeddings=True)
    write = bench["random_model"].write
    write(tied, tmp_path / "one")
    write(tied, tmp_path / "many", shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)
    stored = json.loads((tmp_path / "one/model.safetensors.index.json").read_text())["weight_map"]
    assert "lm_head.weight" not in stored


def test_weights_that_are_there_are_kept_and_others_replaced(bench, tmp_path) -> None:
    write, source = bench["random_model"].write, sizes(tmp_path / "sizes")
    write(source, tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    before = file.stat().st_mtime_ns
    write(source, tmp_path / "model", context=4096)
    assert file.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "model/config.json").read_text())["max_position_embeddings"] == 4096
    write(sizes(source, num_hidden_layers=1), tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.num_hidden_layers == 1


def test_a_vocabulary_that_the_tokenizer_does_not_fit_is_refused(bench, tmp_path) -> None:
    with pytest.raises(SystemExit, match="a vocabulary of 32000, and the tokenizer has 49152"):
        bench["random_model"].write(sizes(tmp_path / "sizes", vocab_size=32000), tmp_path / "model")


# --- the cases ---


def test_the_cases_are_every_method_at_every_length(bench) -> None:
    cases, case = bench["gpu_cases"], bench["gpu_cases"].Case
    assert tuple(cases.METHODS) == METHODS
    found = list(cases.cases(["lora", "longlora", "qlora-paper"], [8192, 2048], flash=False))
    assert found == [
        case("qlora-paper", 512, recompute=True),
        case("lora", 2048),
        case("longlora", 2048),
        case("lora", 2048, 4),
        case("lora", 8192),
        case("longlora", 8192),
        case("lora", 8192, 4),
    ]
    assert list(cases.cases(["s2", "longlora"], [2048], flash=False)) == [
        case("longlora", 2048),
        *(case(name, 2048, recompute=True) for name in ("lora", "s2", "longlora")),
    ]
    flash = set(cases.cases(["lora", "qlora"], [2048], flash=True)) - set(cases.cases(["lora", "qlora"], [2048], False))
    assert flash == {case("lora", 2048, n, "flash_attention_2") for n in (1, 4)}
    everything = list(cases.cases(list(METHODS), [2048], flash=True))
    assert [c.method for c in everything if c.has_peers] == ["lora", "qlora"]


@pytest.mark.parametrize("documents", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_row_is_full(bench, recipe_of, method: str, documents: int) -> None:
    recipe = recipe_of(bench["gpu_cases"].Case(method, LENGTH, documents))
    plan = resolve(recipe)
    assert plan.row_lengths == [LENGTH] * 3 * bench["gpu_cases"].BATCH
    assert {len(row) for row in plan.rows} == {documents}
    assert summary_of(plan)["data"]["target_tokens"] == LENGTH // 2 * 3 * bench["gpu_cases"].BATCH
    assert (plan.total_steps, plan.global_batch) == (3, bench["gpu_cases"].BATCH)


def test_the_pair_that_compares_attention_differs_in_attention_alone(bench, recipe_of) -> None:
    full, s2 = (recipe_of(bench["gpu_cases"].Case(name, LENGTH)) for name in ("lora", "s2"))
    assert summary_of(resolve(full))["method"]["trainable"] == summary_of(resolve(s2))["method"]["trainable"]
    assert full.model_dump(exclude={"method"}) == s2.model_dump(exclude={"method"})


def test_the_paper_s_setting_and_galore_s(bench) -> None:
    recipe = bench["gpu_cases"].recipe
    paper = recipe(
        bench["gpu_cases"].Case("qlora-paper", 512, recompute=True), Path("m"), Path("r"), 4, 4096, Path("o")
    )
    assert (paper["method"]["rank"], paper["optimizer"]["name"]) == (64, "paged_adamw")
    assert paper["training"]["gradient_checkpointing"] is True
    galore = recipe(bench["gpu_cases"].Case("galore", 2048), Path("m"), Path("r"), 4, 4096, Path("o"))
    assert (galore["method"]["rank"], galore["method"]["weights"]) == (1024, "bfloat16")


def test_rows_that_documents_do_not_fill_are_refused(bench, tmp_path) -> None:
    with pytest.raises(SystemExit, match="rows of 66 tokens cannot hold 4"):
        bench["gpu_cases"].write_rows(tmp_path / "rows", ["a"], bench["gpu_cases"].Case("lora", 66, 4), 2)


# --- what a run says ---


def finished(run: Path, fill: float = 1.0) -> Path:
    """A run directory of three updates, of which the first was slow."""
    run.mkdir(parents=True)
    steps = [
        {"event": "step", "loss": 11.0 - i, "seconds": s, "tokens": 512, "target_tokens": 256}
        for i, s in enumerate((9.0, 1.0, 3.0))
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in [{"event": "start"}, *steps]))
    record = {
        "plan": {
            "data": {"fill": fill},
            "memory": {"optimizer": 100, "total": 1100},
            "training": {"recomputed_blocks": 1, "blocks": 2},
            "method": {"trainable": 7},
        },
        "measured": {"peak_bytes": 1000},
        "lean": {"attention": "per document"},
        "optimizer": "torch.optim.AdamW",
        "vitals_line": "",
    }
    (run / "run.json").write_text(json.dumps(record))
    return run


def test_the_first_update_is_not_counted(bench, tmp_path) -> None:
    cases = bench["gpu_cases"]
    read = cases.read_run(finished(tmp_path / "run"), cases.Case("lora", 256))
    assert (read["tokens_per_second"], read["step_seconds"], read["first_step_seconds"]) == (256.0, 2.0, 9.0)
    assert (read["peak_bytes"], read["first_loss"], read["attention"]) == (1000, 11.0, "per document")
    result = read | {"status": "ok"}
    assert bench["gpu_report"].ratio(result, cuda=False) == 1.1
    assert bench["gpu_report"].ratio(result, cuda=True) == 1.1
    paged = result | {"optimizer": "bitsandbytes.optim.adamw.PagedAdamW32bit"}
    assert bench["gpu_report"].ratio(paged, cuda=True) == 1.0, "a paged state is not the allocator's"
    with pytest.raises(LookupError, match="other lengths than 256"):
        cases.read_run(finished(tmp_path / "short", fill=0.9), cases.Case("lora", 256))


def test_what_a_peer_prints_is_read(bench) -> None:
    peers, case = bench["gpu_peers"], bench["gpu_cases"].Case("lora", 256)
    found = {"seconds": [9.0, 1.0, 3.0], "losses": [11.0, 10.0, 9.0], "tokens": [512.0, None, None]}
    found |= {"attention": "sdpa", "trainable": 7, "peak_bytes": 1000}
    read = peers.read(f"noise\nmeasured: {json.dumps(found)}\nnoise", case, cuda=True)
    assert (read["tokens_per_second"], read["first_loss"], read["peak_bytes"]) == (256.0, 11.0, 1000)
    with pytest.raises(LookupError, match="saw 500 tokens in the first update, not 512"):
        peers.read(f"measured: {json.dumps(found | {'tokens': [500]})}", case, cuda=True)
    with pytest.raises(LookupError, match="no line of measurements"):
        peers.read("nothing", case, cuda=True)


@pytest.mark.parametrize(
    ("log", "status", "reason"),
    [
        ("x\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n", "out of memory", "Tried"),
        ("CUDA Error: out of memory at line 12\nbye", "out of memory", "line 12"),
        ("use less to keep from running out of memory\nValueError: no such thing\n", "failed", "no such thing"),
        ("error: checkpoints need 60 GiB, and 40 GiB are free\n  help: lower", "failed", "checkpoints need"),
        ("half a line", "failed", "ended with -9 after 1800 s"),
    ],
)
def test_why_a_run_ended(bench, log: str, status: str, reason: str) -> None:
    found = bench["gpu_cases"].failure(log, "ended with -9 after 1800 s")
    assert found[0] == status
    assert reason in found[1]


# --- the runner ---


@pytest.fixture
def comparison(bench, model, tmp_path):
    """A ``Bench`` that has made its model and peers."""
    gpu = bench["gpu"]
    made = gpu.Bench.__new__(gpu.Bench)
    made.args = gpu.parse(["--device", "cpu", "--lengths", "64", "--updates", "3"])
    made.cuda, made.root, made.directory, made.runs = False, tmp_path, tmp_path, tmp_path / "runs"
    made.model, made.figures, made.variables = model, tmp_path / "gpu.json", {}
    made.facts = json.loads((model / "random.json").read_text())
    made.dtype = "bfloat16"
    made.words = json.loads((model / "words.json").read_text())
    made.bins, made.absent = {"trl": Path(sys.executable).parent}, {}
    made.header, made.results, made.checkpointing = made._header(), {}, set()
    return made


def test_a_case_out_of_memory_is_kept_and_stops_nothing(bench, comparison, monkeypatch) -> None:
    measure, case = bench["measure"], bench["gpu_cases"].Case("lora", 64)

    def run(command, environment, log, timeout_seconds, cuda):
        finished(log.parent / "run")
        log.write_text(f"torch.OutOfMemoryError: CUDA out of memory in {comparison.runs}/x")
        raise measure.ProcessFailed(f"...\nended with 1 after 3 s; see {log}")

    monkeypatch.setattr(measure, "run", run)
    result = comparison.measure("ftune", case)
    comparison.keep(result)
    assert (result["status"], result["predicted"]["total"]) == ("out of memory", 1100)
    assert str(comparison.runs) not in json.dumps(result)
    assert not (comparison.runs / "ftune-lora-64x1-sdpa/run").exists()
    assert comparison.is_known("ftune", case)
    assert not comparison.is_known("trl", case)
    assert comparison._earlier().keys() == {("ftune", case.key)}
    comparison.keep(result | {"status": "failed"})
    assert not comparison.is_known("ftune", case)
    comparison.header["device"] = "another"
    with pytest.raises(SystemExit, match="results of another device"):
        comparison._earlier()


def test_a_peer_checkpoints_where_it_must(bench, comparison, monkeypatch) -> None:
    tried = []

    def attempt(tool, case, checkpointing=None):
        tried.append((tool, case.length, checkpointing))
        enough = checkpointing or case.length < 100
        return {"tool": tool, "status": "ok" if enough else "out of memory"}

    monkeypatch.setattr(comparison, "_attempt", attempt)
    case = bench["gpu_cases"].Case
    assert all(comparison.measure("trl", case("lora", length))["status"] == "ok" for length in (64, 128, 256))
    assert tried == [("trl", 64, False), ("trl", 128, False), ("trl", 128, True), ("trl", 256, True)]


def test_a_plan_that_was_too_hopeful_is_said_and_all_blocks_are_recomputed(bench, comparison, monkeypatch) -> None:
    tried, recomputed = [], 1

    def attempt(tool, case, checkpointing=None):
        tried.append(checkpointing)
        return {"status": "ok" if checkpointing else "out of memory", "recomputed_blocks": recomputed, "blocks": 2}

    monkeypatch.setattr(comparison, "_attempt", attempt)
    case = bench["gpu_cases"].Case("lora", 64)
    found = comparison.measure("ftune", case)
    assert (found["status"], found["auto"], tried) == ("ok", "out of memory", [None, True])
    recomputed = 2
    assert comparison.measure("ftune", case)["status"] == "out of memory"
    assert tried == [None, True, None]
    recipe = bench["gpu_cases"].recipe(case, Path("m"), Path("r"), 4, 64, Path("o"), recompute=True)
    assert recipe["training"]["gradient_checkpointing"] is True


def test_peers_train_directly_behind_ftune(comparison) -> None:
    order = [(tool, case.key) for tool, case in comparison.plan() if case.method in ("lora", "qlora")]
    assert order == [
        ("ftune", "lora-64x1-sdpa"),
        ("trl", "lora-64x1-sdpa"),
        ("ftune", "qlora-64x1-sdpa"),
        ("trl", "qlora-64x1-sdpa"),
        ("ftune", "lora-64x4-sdpa"),
        ("ftune", "lora-64x1-sdpa-recompute"),
    ]


@pytest.mark.parametrize("tool", ["trl", "unsloth"])
def test_a_peer_is_asked_for_the_same_update(bench, tmp_path, tool: str) -> None:
    case = bench["gpu_cases"].Case("qlora", 64)
    job = bench["job"].Job(Path("model"), tmp_path, "rows", 4, bench["gpu_cases"].BATCH, 1, 64, True, tmp_path)
    command = bench["gpu_peers"].command(tool, case, True, job, tmp_path / "rows.jsonl", Path("bin"))
    settings = yaml.safe_load(Path(command[-1]).read_text())
    assert (settings["four_bit"], settings["checkpointing"], settings["max_length"]) == (True, True, 64)
    assert (settings["rank"], settings["alpha"]) == (bench["job"].RANK, bench["job"].ALPHA)
    trainer = settings["trainer"]
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] == 2
    assert trainer["max_steps"] == 4
    assert any("bitsandbytes" in name for name in bench["gpu_peers"].TOOLS[tool].requirements)


def test_without_a_gpu_the_command_says_so(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench["gpu"].shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        bench["gpu"].parse([])
    assert "no GPU to measure on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench["gpu"].parse(["--device", "cpu", "--peers", "trll"])
    assert "unknown peers: trll" in capsys.readouterr().err


# --- the page ---


def figures(bench) -> dict[str, Any]:
    case = bench["gpu_cases"].Case
    ok = {"status": "ok", "step_seconds": 2.0, "first_step_seconds": 9.0, "tokens_per_second": 1000.0}
    ok |= {"peak_bytes": 20 * 2**30, "device_peak_bytes": 22 * 2**30, "first_loss": 12.5, "attention": "per document"}
    ok |= {"recomputed_blocks": 3, "blocks": 32, "predicted": {"total": 23 * 2**30, "optimizer": 2**30}}
    ok |= {"optimizer": "bitsandbytes.optim.adamw.PagedAdamW32bit", "kernels": "fused"}
    lost = {"status": "out of memory", "reason": "CUDA out of memory"}
    peer = {"status": "ok", "step_seconds": 4.0, "first_step_seconds": 8.0, "tokens_per_second": 500.0}
    peer |= {"peak_bytes": 40 * 2**30, "device_peak_bytes": None, "first_loss": 12.5, "agrees": True}

    def result(tool: str, of: Any, more: dict[str, Any], checkpointing: bool | None = None) -> dict[str, Any]:
        return {"tool": tool, "case": dataclasses.asdict(of), "checkpointing": checkpointing} | more

    return {
        "date": "2027-01-01",
        "device": "a GPU",
        "cuda": True,
        "model": {"name": "llama-3-8b", "parameters": 8_030_261_248, "std": 0.02},
        "work": {"updates": 4, "batch": 2, "rank": 16, "alpha": 32},
        "tools": {"ftune": {"title": "ftune", "versions": {}}, "trl": {"title": "TRL", "versions": {"trl": "1"}}},
        "absent": {"Unsloth": "its packages could not be installed here"},
        "results": [
            result("ftune", case("qlora-paper", 512), ok),
            result("ftune", case("lora", 8192), ok),
            result("trl", case("lora", 8192), peer, False),
            result("ftune", case("lora", 8192, recompute=True), ok),
            result("ftune", case("s2", 8192, recompute=True), ok | {"step_seconds": 1.0, "peak_bytes": 10 * 2**30}),
            result("ftune", case("longlora", 8192), ok),
            result(
                "ftune",
                case("longlora", 8192, recompute=True),
                lost | {k: ok[k] for k in ("predicted", "blocks", "recomputed_blocks")},
            ),
            result("ftune", case("lora", 8192, 4), ok | {"auto": "out of memory"}),
            result("ftune", case("qlora", 8192), ok),
            result("trl", case("qlora", 8192), peer | {"agrees": False, "first_loss": 10.0}, True),
            result("ftune", case("lora", 32768), {"status": "failed", "reason": "error: a | b"}),
            result("trl", case("lora", 32768), lost, True),
        ],
    }


def rows_of(page: str, heading: str) -> list[list[str]]:
    part = page.partition(heading)[2]
    lines = part[part.index("\n|") :].lstrip("\n").split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_with_measurements(bench) -> None:
    page = bench["gpu_report"].section(bench["arithmetic"].compute(), figures(bench))
    first = rows_of(page, "## On a GPU")
    assert ["lora", "8,192", "1", "per document", "3 of 32", "no", "1,000", "9.0", "20.0", "22.0", "1.10"] in first
    lost = [row for row in first if row[0] == "longlora"][1]
    assert (lost[6], lost[-1]) == ("**out of memory**", "23.0 GiB predicted")
    assert any(row[4] == "3 of 32, where `auto` ran out of memory" for row in first)
    assert any(row[1] == "32,768" and row[6] == "**failed**: error: a / b" for row in first)
    assert {len(row) for row in first} == {11}
    lora, qlora, last = rows_of(page, "### Beside other tools")
    assert lora[4:6] == ["off", "500"]
    assert lora[-3:] == ["12.500 (ftune 12.500)", "**2.00**", "**0.50**"]
    assert qlora[-3:] == ["10.000 (ftune 12.500: DIFFERS)", "-", "-"]
    assert last[5] == "**out of memory**"
    assert rows_of(page, "### Shifted sparse attention") == [
        ["8,192", "lora over S2-Attn", "lora", "**0.50**", "**0.50**"],
        ["8,192", "longlora", "lora", "out of memory against ok", "-"],
    ]
    assert "the 8B model in the same setting was, at 1.10 predicted / measured" in page
    assert "Unsloth is not in the table" in page
    assert "(1)" not in page
    assert "not in force" not in page
    replayed = figures(bench)
    replayed["results"][0]["graphs"] = {"shapes": 1, "replayed_micro_batches": 7}
    page = bench["gpu_report"].section(bench["arithmetic"].compute(), replayed)
    assert rows_of(page, "## On a GPU")[0][5] == "yes"
    lost = figures(bench)
    lost["results"][0]["kernels"] = "eager"
    assert "not in force" in bench["gpu_report"].section(bench["arithmetic"].compute(), lost)
    noted = figures(bench)
    noted["results"][1]["note"] = noted["results"][-1]["note"] = "Of another day"
    page = bench["gpu_report"].section(bench["arithmetic"].compute(), noted)
    assert page.count(" (1) |") == 2
    assert "\n(1) Of another day.\n" in page
    assert "No GPU was at hand" not in page


def test_the_page_without_a_gpu_says_so(bench) -> None:
    page = bench["gpu_report"].section(bench["arithmetic"].compute(), None)
    assert "No GPU was at hand" in page
    assert "`make bench-gpu`" in page
    assert rows_of(page, "### QLoRA's claim")[0][-2:] == ["45.2", "fits"]


def test_the_arithmetic_is_that_of_this_version(bench) -> None:
    found = bench["arithmetic"].compute()
    kept = json.loads(bench["arithmetic"].FIGURES.read_text(encoding="utf-8"))
    assert found == kept, "run scripts/bench/arithmetic.py and scripts/bench/report.py"
    fits = {(row["shape"], row["method"], row["optimizer"]): row["fits"] for row in found["rows"]}
    assert fits["llama-65b", "qlora", "paged_adamw"]
    assert not fits["llama-65b", "lora", "adamw"]


@pytest.mark.slow
def test_the_whole_way_on_a_cpu(tmp_path) -> None:
    command = [sys.executable, str(DIRECTORY / "gpu.py"), "--device", "cpu", "--peers", "none", "--threads", "1"]
    command += ["--sizes", str(sizes(tmp_path / "tiny")), "--directory", str(tmp_path / "bench")]
    command += ["--methods", "lora", "s2", "--lengths", "64", "--updates", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "bench/gpu/gpu.json").read_text())
    assert [result["status"] for result in found["results"]] == ["ok"] * 4, done.stdout
    lora, packed, full, s2 = found["results"]
    assert [result["recomputed_blocks"] for result in found["results"]] == [0, 0, 2, 2]
    assert lora["tokens"] == s2["tokens"] == packed["tokens"] == 128
    assert lora["first_loss"] == pytest.approx(10.8, abs=0.1)  # ln(49152)
    assert 0.3 < lora["predicted"]["total"] / lora["peak_bytes"] < 3
    assert (packed["attention"], packed["case"]["documents"]) == ("per document", 4)
    assert "shifted" in s2["vitals"]
    assert str(tmp_path) not in json.dumps(found)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.count(": known") == 4
