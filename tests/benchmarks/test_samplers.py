"""The samplers of benchmarks/samplers.py against flows whose solution is known."""

import pytest
import torch
from benchmark_scripts import load
from dit_quant.demo.sampler import shifted_sigmas

samplers = load("samplers")
MEAN, WIDTH = 0.7, 0.4
DETERMINISTIC = ("euler", "heun", "dpmpp_2m")


def gaussian(mean: float, width: float):
    """The exact velocity for pictures drawn from N(mean, width^2)."""

    def velocity(x, sigma):
        spread = (1 - sigma) ** 2 * width**2 + sigma**2
        denoised = mean + (1 - sigma) * width**2 / spread * (x - (1 - sigma) * mean)
        return (x - denoised) / sigma

    return velocity


def schedule(steps: int, shift: float = 3.0) -> list[float]:
    return shifted_sigmas(steps, shift).double().tolist()


def noise_of(count: int) -> torch.Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Where the deterministic flow from `noise` stands at sigma."""
    return (1 - sigma) * MEAN + ((1 - sigma) ** 2 * WIDTH**2 + sigma**2) ** 0.5 * noise


def error(sampler: str, sigmas: list[float]) -> float:
    """Distance from the exact flow at the last sigma, having started on it at the first."""
    noise = noise_of(16)
    found = samplers.SAMPLERS[sampler](gaussian(MEAN, WIDTH), exact(noise, sigmas[0]), sigmas)
    return float((found - exact(noise, sigmas[-1])).norm() / noise.norm())


def marginal(steps: int, until: int) -> tuple[float, float]:
    """Mean and variance that dpmpp_2m_sde leaves after `until` of `steps` steps.

    The sampler is affine in the start and in every fresh noise, so one row per source gives both without sampling.
    """
    start, fresh = torch.zeros(until + 2, dtype=torch.float64), torch.zeros(until, until + 2, dtype=torch.float64)
    start[-2] = 1
    fresh[:, :until] = torch.eye(until)
    found = samplers.dpmpp_2m_sde(gaussian(MEAN, WIDTH), start, schedule(steps)[: until + 1], lambda i: fresh[i])
    mean = float(found[-1])
    return mean, float(((found[:-1] - mean) ** 2).sum())


@pytest.mark.parametrize("sampler", sorted(samplers.SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_one_picture_is_reached_in_any_number_of_steps(sampler, steps):
    """The flow towards a point is straight."""
    noise = noise_of(4)
    found = samplers.SAMPLERS[sampler](gaussian(MEAN, 0.0), noise, schedule(steps), lambda i: noise_of(i + 5)[-4:])
    torch.testing.assert_close(found, torch.full_like(noise, MEAN))


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_on_the_way_to_one_picture(sampler):
    noise, sigmas = noise_of(4), schedule(9)[:6]
    found = samplers.SAMPLERS[sampler](gaussian(MEAN, 0.0), noise, sigmas)
    torch.testing.assert_close(found, (1 - sigmas[-1]) * MEAN + sigmas[-1] * noise)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(sampler, order):
    """Twice the steps divide the error by 2^order, away from the ends where log-SNR is infinite."""
    coarse, fine = (error(sampler, torch.linspace(0.9, 0.1, 128 * k + 1).tolist()) for k in (1, 2))
    assert coarse / fine == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize(("sampler", "bound"), [("euler", 1e-2), ("heun", 1e-3), ("dpmpp_2m", 1e-3)])
def test_whole_pictures_converge(sampler, bound):
    """Both ends included, from noise to N(MEAN, WIDTH^2)."""
    assert error(sampler, schedule(256)) < bound


@pytest.mark.parametrize(("sampler", "evaluations"), [("euler", 6), ("heun", 11), ("dpmpp_2m", 6), ("dpmpp_2m_sde", 6)])
def test_evaluations(sampler, evaluations):
    """Never at sigma 0, where the velocity of a picture model is not defined."""
    levels = []

    def counted(x, sigma):
        levels.append(sigma)
        return gaussian(MEAN, WIDTH)(x, sigma)

    samplers.SAMPLERS[sampler](counted, noise_of(1), schedule(6), lambda i: noise_of(1))
    assert len(levels) == evaluations
    assert set(levels) == set(schedule(6)[:-1])


@pytest.mark.parametrize("until", [64, 160, 200])
def test_sde_keeps_the_marginal(until):
    """Half-way and at the end: N((1 - sigma) MEAN, (1 - sigma)^2 WIDTH^2 + sigma^2), closer with more steps."""

    def miss(factor: int) -> tuple[float, float]:
        sigma = schedule(200 * factor)[until * factor]
        mean, variance = marginal(200 * factor, until * factor)
        return mean - (1 - sigma) * MEAN, variance / ((1 - sigma) ** 2 * WIDTH**2 + sigma**2) - 1

    coarse, fine = miss(1), miss(2)
    assert abs(coarse[0]) < 1e-12
    assert abs(coarse[1]) < 0.03
    assert abs(fine[1]) < 0.4 * abs(coarse[1])


def test_sde_noise_is_used():
    """Same start, other noise: another picture of the same distribution."""
    noise = noise_of(4)
    found = [
        samplers.dpmpp_2m_sde(gaussian(MEAN, WIDTH), noise, schedule(8), lambda i, k=k: noise_of(4 * (i + 2 + k))[-4:])
        for k in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).norm() > 0.1
