"""How far apart two tensors are."""

import math

import torch
from torch import Tensor


def relative_l2(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|."""
    reference = reference.double()
    tiny = torch.finfo(torch.float64).tiny
    return float((value.double() - reference).norm() / reference.norm().clamp(min=tiny))


def psnr_db(value: Tensor, reference: Tensor, peak: float = 1.0) -> float:
    """Peak signal to noise ratio of pictures in 0..peak, in decibels; infinity for equal pictures."""
    mse = float((value.double() - reference.double()).square().mean())
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)
