"""How far apart two tensors are."""

import math

import torch
from torch import Tensor


def relative_l2(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference|."""
    reference = reference.double()
    tiny = torch.finfo(torch.float64).tiny
    return float((value.double() - reference).norm() / reference.norm().clamp(min=tiny))


def sqnr_db(value: Tensor, reference: Tensor) -> float:
    """Signal to quantization noise ratio in decibels; infinity for equal tensors."""
    error = relative_l2(value, reference)
    return math.inf if error == 0 else -20 * math.log10(error)


def psnr_db(value: Tensor, reference: Tensor, peak: float = 1.0) -> float:
    """Peak signal to noise ratio of pictures in 0..peak, in decibels; infinity for equal pictures."""
    mse = float((value.double() - reference.double()).square().mean())
    return math.inf if mse == 0 else 10 * math.log10(peak**2 / mse)
