"""Samplers of the rectified flow x_sigma = (1 - sigma) x0 + sigma noise, over a plain velocity(x, sigma).

Every sampler takes (velocity, x, sigmas, noise): sigmas decrease, 1 to 0 for a whole picture; noise(i) is the fresh
noise of step i and only the stochastic one asks for it. All go to sigma 0 in first order, as ComfyUI's do.
"""

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

Field = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]


def euler(velocity: Field, x: Tensor, sigmas: Sequence[float], noise: Noise | None = None) -> Tensor:
    """One evaluation per step, first order."""
    for sigma, following in itertools.pairwise(sigmas):
        x = x + (following - sigma) * velocity(x, sigma)
    return x


def heun(velocity: Field, x: Tensor, sigmas: Sequence[float], noise: Noise | None = None) -> Tensor:
    """Karras et al. 2022 (arXiv 2206.00364), algorithm 1: two evaluations per step but the last, second order."""
    for sigma, following in itertools.pairwise(sigmas):
        slope = velocity(x, sigma)
        if following > 0:
            slope = (slope + velocity(x + (following - sigma) * slope, following)) / 2
        x = x + (following - sigma) * slope
    return x


def dpmpp_2m(velocity: Field, x: Tensor, sigmas: Sequence[float], noise: Noise | None = None) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): one evaluation per step, second order."""
    return _multistep(velocity, x, sigmas, noise, eta=0)


def dpmpp_2m_sde(velocity: Field, x: Tensor, sigmas: Sequence[float], noise: Noise | None = None) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix), midpoint form: fresh noise at every step but the last."""
    return _multistep(velocity, x, sigmas, noise, eta=1)


def _multistep(velocity: Field, x: Tensor, sigmas: Sequence[float], noise: Noise | None, *, eta: int) -> Tensor:
    """Exponential integrator of the denoised picture, extrapolated in half-log-SNR."""
    previous, last = None, math.inf
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        denoised = x - sigma * velocity(x, sigma)
        width = half_log_snr(following) - half_log_snr(sigma)
        target = denoised
        if previous is not None and following > 0:
            target = denoised + width / (2 * last) * (denoised - previous)
        # exp(-width), which is 0 and needs no limit where the step starts at sigma 1
        decay = following * (1 - sigma) / (sigma * (1 - following))
        x = following / sigma * decay**eta * x + (1 - following) * (1 - decay ** (1 + eta)) * target
        if eta and following > 0:
            x = x + following * math.sqrt(1 - decay ** (2 * eta)) * noise(i)
        previous, last = denoised, width
    return x


def half_log_snr(sigma: float) -> float:
    """ln((1 - sigma) / sigma); infinite at both ends."""
    if 0 < sigma < 1:
        return math.log1p(-sigma) - math.log(sigma)
    return -math.inf if sigma >= 1 else math.inf


SAMPLERS = {sampler.__name__: sampler for sampler in (euler, heun, dpmpp_2m, dpmpp_2m_sde)}
