"""Subspaces, moments and storage of GaLore against dense formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ftune.ops.galore import (
    adam_direction,
    captured_energy,
    coarse_products,
    from_8bit,
    lift,
    project,
    rotate_moments,
    round_to_bfloat16,
    subspace,
    to_8bit,
)

SHAPES = [(40, 24), (24, 40), (32, 32)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradient(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A matrix with a falling spectrum, as gradients have."""
    noise = torch.randn(rows, columns, generator=generator(seed))
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    return left @ torch.diag(0.8 ** torch.arange(min(rows, columns))) @ right


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["eigh", "svd"])
def test_the_subspace_is_that_of_the_leading_singular_vectors(shape: tuple[int, int], how: Any) -> None:
    grad = gradient(*shape)
    basis = subspace(grad, 6, how)
    left, values, right = torch.linalg.svd(grad.double(), full_matrices=False)
    shorter = right[:6].T if shape[0] >= shape[1] else left[:, :6]
    assert basis.shape == (min(shape), 6)
    assert (basis.T @ basis - torch.eye(6)).abs().max() <= 1e-5
    assert ((basis.double().T @ shorter).abs() - torch.eye(6)).abs().max() <= 1e-5, "the leading one first"
    assert (basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all(), "signs are a convention"
    low = project(grad, basis)
    kept = values[:6].square().sum() / values.square().sum()
    assert float(captured_energy(grad, low)) == pytest.approx(float(kept), rel=1e-5)
    # The best approximation of rank 6 (Eckart and Young).
    best = left[:, :6] @ torch.diag(values[:6]) @ right[:6]
    assert (lift(low, basis) - best).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shorter_side_is_projected(shape: tuple[int, int]) -> None:
    grad = gradient(*shape)
    for rank in (1, min(shape)):
        low = project(grad, subspace(grad, rank, "eigh"))
        assert low.shape == ((shape[0], rank) if shape[0] >= shape[1] else (rank, shape[1]))
        assert lift(low, subspace(grad, rank, "eigh")).shape == shape
    assert (lift(low, subspace(grad, rank, "eigh")) - grad).abs().max() <= 1e-5, "nothing is lost at full rank"
    with pytest.raises(ValueError, match="exceeds the shorter side"):
        subspace(grad, min(shape) + 1, "eigh")


def test_a_sketch_is_drawn_from_its_generator_and_captures_a_little_less() -> None:
    grad = torch.randn(96, 64, generator=generator())
    first, again, other = (subspace(grad, 8, "randomized", generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.T @ first - torch.eye(8)).abs().max() <= 1e-5
    exact, sketched = (float(captured_energy(grad, project(grad, b))) for b in (subspace(grad, 8, "svd"), first))
    assert 0.9 * exact < sketched < exact


def test_a_sketch_is_drawn_on_the_device_of_its_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    devices, draw = [], torch.randn

    def watched(*size: int, **settings: Any) -> torch.Tensor:
        devices.append(settings["device"])
        return draw(*size, **settings)

    grad, source = torch.ones(6, 4), generator()
    monkeypatch.setattr(torch, "randn", watched)
    subspace(grad, 2, "randomized", source)
    subspace(grad, 2, "randomized")
    assert devices == [source.device, grad.device]


def test_products_are_coarse_inside_only() -> None:
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    assert before != "tf32"
    with coarse_products(False):
        assert products.fp32_precision == before
    inside = []

    def fails() -> None:
        with coarse_products():
            inside.append(products.fp32_precision)
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, fails)
    assert inside == ["tf32"]
    assert products.fp32_precision == before
    assert not products.allow_tf32  # which torch refuses to say where the two settings differ


@pytest.mark.parametrize("how", ["eigh", "svd", "randomized"])
def test_a_bf16_gradient_and_a_tiny_one_give_the_basis_of_fp32(how: Any) -> None:
    grad = gradient(40, 24).bfloat16()
    expected = subspace(grad.float(), 4, how, generator())
    assert torch.equal(subspace(grad, 4, how, generator()), expected)
    # In fp32 the squares of these are zero.
    tiny = subspace(grad.float() * 2.0**-90, 4, how, generator())
    assert torch.equal(tiny, expected)


def test_zeros_have_some_basis_and_no_energy() -> None:
    basis = subspace(torch.zeros(8, 6), 2, "eigh")
    assert (basis.T @ basis - torch.eye(2)).abs().max() <= 1e-6
    assert float(captured_energy(torch.zeros(8, 6), torch.zeros(8, 2))) == 0.0


def test_the_direction_is_torch_s() -> None:
    weight = torch.nn.Parameter(torch.zeros(5, 7))
    optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    first, second = torch.zeros(5, 7), torch.zeros(5, 7)
    for step in range(1, 6):
        grad = gradient(5, 7, step)
        before = weight.detach().clone()
        weight.grad = grad.clone()
        optimizer.step()
        direction = adam_direction(first, second, grad, (0.9, 0.95), 1e-8, step)
        assert (before - weight.detach() - direction).abs().max() <= 1e-6
        assert torch.equal(grad, gradient(5, 7, step))


class TestMomentsInANewSubspace:
    BETAS = (0.9, 0.95)

    def moments(self, lying: bool) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.randn(4, 9, generator=generator(1))
        second = first.square() + torch.rand(4, 9, generator=generator(2))
        return (first.mT, second.mT) if lying else (first, second)

    @pytest.mark.parametrize("lying", [False, True])
    def test_renamed_axes_rename_the_moments(self, lying: bool) -> None:
        # A permutation with signs is exact whatever the gradients were.
        change = torch.eye(4)[[2, 0, 3, 1]] * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
        first, second = self.moments(lying)
        bias = 1 - 0.9**10, 1 - 0.95**10
        turned = rotate_moments(first * bias[0], second * bias[1], change, self.BETAS, 10)
        expected = [change @ (first.mT if lying else first), change.abs() @ (second.mT if lying else second)]
        for actual, wanted, factor in zip(turned, expected, bias, strict=True):
            assert ((actual.mT if lying else actual) - wanted * factor).abs().max() <= 1e-5

    def test_independent_coordinates_get_the_moments_they_really_have(self) -> None:
        # 200,000 gradients with independent coordinates: means and squares in the new coordinates, counted.
        change = torch.linalg.qr(torch.randn(4, 4, generator=generator(5))).Q[:3]
        mean, spread = torch.randn(4, 1, generator=generator(6)), torch.rand(4, 1, generator=generator(7)) + 0.5
        grads = mean + spread * torch.randn(4, 200_000, generator=generator(8))
        steps = 10_000  # no bias left
        first, second = rotate_moments(mean.expand(4, 5), (mean**2 + spread**2).expand(4, 5), change, self.BETAS, steps)
        seen = change @ grads
        assert (first - seen.mean(1, keepdim=True)).abs().max() <= 2e-2
        assert (second - seen.square().mean(1, keepdim=True)).abs().max() <= 5e-2
        # Rotating the second moment like a mean would be another number, and may be negative.
        assert (change @ (mean**2 + spread**2) - seen.square().mean(1, keepdim=True)).abs().max() > 0.2

    def test_the_update_stays_bounded(self) -> None:
        # Estimates for which v - m^2 is negative: the moments decay at different rates.
        first, second = self.moments(False)
        change = torch.linalg.qr(torch.randn(4, 4, generator=generator(5))).Q
        turned, squares = rotate_moments(first, 0.5 * second, change, self.BETAS, 10_000)
        assert (turned.abs() <= squares.sqrt() + 1e-6).all()


class TestEightBits:
    @pytest.mark.parametrize("signed", [True, False])
    @pytest.mark.parametrize("shape", [(4, 256), (33, 77), (3,)])
    def test_each_value_becomes_the_nearest_of_bitsandbytes_table(self, signed: bool, shape: tuple[int, ...]) -> None:
        from bitsandbytes.functional import create_dynamic_map

        table = create_dynamic_map(signed=signed).double()
        values = (
            torch.randn(shape, generator=generator())
            * torch.logspace(-6, 0, shape[0])[(..., *[None] * (len(shape) - 1))]
        )
        values = values if signed else values.abs()
        codes, scales = to_8bit(values, signed=signed)
        assert codes.dtype == torch.uint8
        assert codes.shape == shape
        assert scales.shape == (-(-values.numel() // 256),)
        found = from_8bit(codes, scales, signed=signed)
        for block, back, scale in zip(values.flatten().split(256), found.flatten().split(256), scales, strict=True):
            assert scale == block.abs().max()
            scaled = block.double() / scale
            error = (back / scale - scaled).abs()
            least = (scaled[:, None] - table).abs().amin(1)
            # Values between two codes are rounded to half precision first.
            # An unsigned value that is not zero does not become it.
            assert (error <= least + 1e-3 * scaled.abs() + (0 if signed else 4e-7)).all()

    def test_zero_is_zero(self) -> None:
        values = torch.zeros(2, 300)
        values[0, 0] = 1.0
        for signed in (True, False):
            assert torch.equal(from_8bit(*to_8bit(values, signed=signed), signed=signed), values)

    def test_what_is_divided_by_never_becomes_zero(self) -> None:
        values = torch.full((2, 256), 1e-9)
        values[:, 0] = 1.0
        values[1, 1:] = 0.0
        found = from_8bit(*to_8bit(values, signed=False), signed=False)
        assert (found[0] > 0).all()
        assert (found[1, 1:] == 0).all()


class TestRandomRounding:
    def test_the_mean_is_the_value(self) -> None:
        for value in (1.001, -1.001, 3.3e-5, -7.7e20):
            values = torch.full((100_000,), value)
            rounded = round_to_bfloat16(values, generator()).float()
            near = values[:1].bfloat16().float()
            below, above = rounded.min(), rounded.max()
            assert below < value < above
            assert len(rounded.unique()) == 2
            assert near in (below, above)
            assert abs(float(rounded.double().mean()) - value) <= 0.02 * float(above - below)

    def test_what_fits_stays(self) -> None:
        values = torch.randn(1000, generator=generator()).bfloat16()
        assert torch.equal(round_to_bfloat16(values.float(), generator(3)), values)

    def test_it_depends_on_the_generator_alone(self) -> None:
        values = torch.randn(1000, generator=generator())
        first, again, other = (round_to_bfloat16(values, generator(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
