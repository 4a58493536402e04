"""Reading a model through the host's memory. The other device is ``meta``, which computes no numbers."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftune.methods import METHODS
from ftune.plan.recompute import blocks_of
from ftune.run import through_host
from ftune.run.through_host import block_by_block, move_beside_base

META = torch.device("meta")
METHODS_OF_A_PLAIN_BASE = [name for name in METHODS if tiny.method(name).base_quantization is None]


@pytest.fixture(autouse=True)
def _between_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU and CUDA tensors may exchange their data, CPU and meta tensors must be swapped whole."""

    def put(tensor: torch.Tensor, data: torch.Tensor) -> None:
        parameter = isinstance(tensor, torch.nn.Parameter)
        torch.utils.swap_tensors(tensor, torch.nn.Parameter(data, tensor.requires_grad) if parameter else data.clone())

    monkeypatch.setattr(through_host, "_put", put)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # meta is no device it knows


class OneDevice(TorchDispatchMode):
    """Hold that no operation mixes devices, as CUDA would: meta tensors take what comes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        if len({tensor.device for tensor in tensors}) > 1 and func is not torch.ops.aten._to_copy.default:
            raise AssertionError(f"{func} of tensors on several devices")
        return func(*args, **(kwargs or {}))


def adapted(name: str) -> torch.nn.Module:
    return tiny.method(name).adapt(tiny.model(), tiny.context())


@pytest.mark.parametrize("name", METHODS_OF_A_PLAIN_BASE)
def test_a_block_is_on_the_device_for_its_own_turn_alone(name: str) -> None:
    model = adapted(name).eval()
    blocks = blocks_of(model)
    parameters = dict(model.named_parameters())
    inside = {id(p) for block in blocks for p in block.parameters()}
    before = {key: p.detach().clone() for key, p in parameters.items() if id(p) in inside}
    at_once: list[int] = []

    def look(block: torch.nn.Module, _: object) -> None:
        assert all(tensor.device == META for tensor in [*block.parameters(), *block.buffers()])
        at_once.append(sum(next(other.parameters()).device == META for other in blocks))

    ids = torch.zeros(1, 8, dtype=torch.long, device=META)
    with torch.no_grad():
        with pytest.raises(AssertionError, match="several devices"), OneDevice():
            model(input_ids=ids)
        with block_by_block(model, META), OneDevice():
            looks = [block.register_forward_pre_hook(look) for block in blocks]
            assert model(input_ids=ids).logits.device == META
    assert at_once == [1] * len(blocks)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    for key, p in model.named_parameters():
        assert p is parameters[key]
        if key in before:
            assert torch.equal(p, before[key]), key
        else:
            assert p.device == META, key
    for hook in looks:
        hook.remove()
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


def test_a_block_that_fails_leaves_its_weights_where_they_were() -> None:
    model = tiny.model()
    first = blocks_of(model)[0]

    def fail(*_: object) -> None:
        raise ValueError("in the block")

    with block_by_block(model, META):
        inner = next(first.children()).register_forward_pre_hook(fail)
        with torch.no_grad(), pytest.raises(ValueError, match="in the block"):
            model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=META))
    inner.remove()
    assert {p.device.type for p in first.parameters()} == {"cpu"}


@pytest.mark.parametrize("name", METHODS_OF_A_PLAIN_BASE)
def test_adapters_and_buffers_move_and_the_base_stays(name: str) -> None:
    model = adapted(name)
    whole = tiny.method(name).artifact == "model"
    move_beside_base(model, META, trained=not whole)
    assert all(buffer.device == META for buffer in model.buffers())
    for key, p in model.named_parameters():
        assert (p.device == META) == (p.requires_grad and not whole), key
