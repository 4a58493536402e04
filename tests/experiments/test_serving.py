"""Which engine serves what, by the rules that are published."""

from __future__ import annotations

from typing import Any

import pytest

from ftune.experiments.serving import served
from ftune.methods import METHODS

PLAIN = {"r": 16, "rank_pattern": {}, "use_dora": False, "modules_to_save": None}


@pytest.mark.parametrize(
    ("changes", "vllm"),
    [
        ({}, "adapter, rank 16"),
        ({"r": 17}, "adapter, rank 32"),
        ({"rank_pattern": {"q_proj": 40}}, "adapter, rank 64"),
        ({"r": 512}, "adapter, rank 512"),
        ({"r": 513}, "merged"),
        ({"use_dora": True}, "merged"),
        ({"modules_to_save": ["lm_head"]}, "merged"),
    ],
)
def test_a_lora_adapter_is_served_where_its_rank_and_kind_are_taken(changes: dict[str, Any], vllm: str) -> None:
    assert served(METHODS["lora"], PLAIN | changes)["vllm"] == vllm


@pytest.mark.parametrize(
    ("name", "vllm"),
    [
        ("full", "as it is"),
        ("dora", "merged"),
        ("adalora", "converted"),
        ("fourierft", "converted, roughly"),
        ("ia3", "merged"),
        ("prefix", "no"),
        ("bottleneck", "no"),
    ],
)
def test_every_other_method_goes_the_way_it_says(name: str, vllm: str) -> None:
    assert served(METHODS[name], {"r": 8})["vllm"] == vllm


def test_without_its_adapter_lora_is_merged() -> None:
    assert served(METHODS["lora"], None)["vllm"] == "merged"
