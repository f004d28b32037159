"""The sampler: schedule, guidance, Euler's exactness on straight lines, seeds."""

import itertools

import pytest
import torch
from dit_quant.demo.sampler import guided_velocity, sample, seeded_noise, shifted_sigmas

PROMPT = (torch.ones(2, 8, 64), torch.ones(2, 64))
EMPTY = (torch.zeros(1, 8, 64), torch.zeros(1, 64))


@pytest.mark.parametrize("steps", [1, 2, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_schedule_runs_from_noise_to_picture(steps, shift):
    sigmas = shifted_sigmas(steps, shift)
    assert len(sigmas) == steps + 1
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_shift_keeps_the_odds_ratio():
    """sigma / (1 - sigma) = shift * t / (1 - t): what the shift means."""
    t, sigmas = torch.linspace(1, 0, 11)[1:-1], shifted_sigmas(10, 3.0)[1:-1]
    torch.testing.assert_close(sigmas / (1 - sigmas), 3 * t / (1 - t))


@pytest.mark.parametrize("steps", [1, 5])
def test_straight_flow_is_solved_exactly(steps):
    picture, noise = seeded_noise([0, 1]), seeded_noise([2, 3])
    target = torch.cat([noise - picture] * 2)
    result = sample(lambda x, sigma, context, pooled: target, noise, PROMPT, EMPTY, steps=steps)
    torch.testing.assert_close(result, picture, rtol=0, atol=2e-5)


def conditional(x, sigma, context, pooled):
    """Velocity 2 with a prompt, 1 without."""
    return torch.ones_like(x) * (1 + pooled[:, :1, None, None])


@pytest.mark.parametrize(("cfg", "expected"), [(0.0, 1.0), (1.0, 2.0), (3.0, 4.0)])
def test_guidance_is_linear_in_its_strength(cfg, expected):
    velocity = guided_velocity(conditional, torch.zeros(2, 16, 4, 4), 0.5, PROMPT, EMPTY, cfg)
    assert (velocity == expected).all()


def test_one_call_per_step_with_both_branches():
    calls, announced = [], []

    def model(x, sigma, context, pooled):
        calls.append((len(x), sigma.unique().tolist(), pooled[:, 0].tolist()))
        return torch.zeros_like(x)

    noise = seeded_noise([5, 6])
    result = sample(model, noise, PROMPT, EMPTY, steps=4, shift=2.0, before_step=announced.append)
    assert torch.equal(result, noise)
    sigmas = shifted_sigmas(4, 2.0).tolist()
    assert announced == sigmas[:-1]
    assert calls == [(4, [sigma], [1, 1, 0, 0]) for sigma in sigmas[:-1]]


def test_sampling_needs_no_gradients():
    weight = torch.ones(1, requires_grad=True)
    noise = seeded_noise([0, 1])
    assert not sample(lambda x, *_: x * weight, noise, PROMPT, EMPTY, steps=2).requires_grad


def test_noise_belongs_to_its_seed():
    together = seeded_noise([7, 8, 9])
    assert together.shape == (3, 16, 16, 16)
    assert torch.equal(together[1:2], seeded_noise([8]))
    for one, two in itertools.combinations(together, 2):
        assert not torch.equal(one, two)
    assert abs(float(together.mean())) < 0.05
    assert abs(float(together.std()) - 1) < 0.05
