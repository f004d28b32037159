"""Inputs of the fused quantizers, what they stand for, and how far two ways of computing it may lie apart."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from dit_quant.kernels.adaln_quantize.reference import adaln
from torch import Tensor

SAMPLES = 3


@dataclass(frozen=True)
class FusedCase:
    """op(*operands, **prologue, ...) quantizes y [M, K] fp32, known up to error [M, K]."""

    op: str
    operands: tuple[Tensor | None, ...]
    prologue: dict[str, Any]
    y: Tensor
    error: Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def summation_error(x, kind, weight=None, modulation_scale=None, **_):
    """Two orders of the same sums: each adds in blocks, in at most 32 + log2 K steps that round by u = 2**-24. The mean
    moves by that share of mean |x|, the deviation by half of it; then both sides round four times more."""
    x = x.double()
    M, K = x.shape
    mean = x.mean(dim=1, keepdim=True) if kind == "layer" else 0
    deviation = (x - mean).square().mean(dim=1, keepdim=True).sqrt()
    u = 2**-23 * (36 + torch.log2(torch.tensor(float(K))).item())
    error = u * (x.abs().mean(dim=1, keepdim=True) + (x - mean).abs()) / deviation
    if weight is not None:
        error = error * weight.abs()
    if modulation_scale is not None:
        error = error * (1 + modulation_scale.double()).abs().repeat_interleave(M // len(modulation_scale), dim=0)
    return error


def _adaln(kind: str, parts: str, tokens: int, K: int, dtype: torch.dtype) -> FusedCase:
    """parts: which of weight, bias, modulation scale and shift are there, by their letters in "wbsh"."""
    x = (2 * normal(SAMPLES, tokens, K) + 0.5).to(dtype)
    tables = {
        "weight": 1 + 0.3 * normal(K, seed=4),
        "bias": normal(K, seed=5).to(dtype),
        "modulation_scale": 0.5 * normal(SAMPLES, K, seed=6).to(dtype),
        "modulation_shift": normal(SAMPLES, K, seed=7).to(dtype),
    }
    given = {
        name: table if letter in parts else None for letter, (name, table) in zip("wbsh", tables.items(), strict=True)
    }
    rows = x.reshape(-1, K)
    y, error = adaln(rows, kind, 1e-6, **given), summation_error(rows, kind, **given)
    return FusedCase("adaln_quantize", (x,), {"kind": kind, "eps": 1e-6, **given}, y, error)


def _gelu(approximate: str, M: int, K: int, dtype: torch.dtype) -> FusedCase:
    x = (2 * normal(M, K)).to(dtype)
    y = F.gelu(x.float(), approximate=approximate)
    # tanh, erf and exp: see test_gelu_quantize.py
    return FusedCase("gelu_quantize", (x,), {"approximate": approximate}, y, 2**-21 * x.float().abs())


def _swiglu(form: str, M: int, K: int, dtype: torch.dtype) -> FusedCase:
    gate, up = (2 * normal(M, K)).to(dtype), normal(M, K, seed=3).to(dtype)
    y = F.silu(gate.float()) * up.float()
    operands = {
        "two": (gate, up),
        "halves": (torch.cat([gate, up], 1), None),
        "up first": (torch.cat([up, gate], 1), None),
    }
    # exp, sum, quotient and product: see test_swiglu_quantize.py
    error = 2**-23 * (6 + gate.float().abs()) * y.abs()
    return FusedCase("swiglu_quantize", operands[form], {"gate_first": form != "up first"}, y, error)


# name -> (tokens per sample, K, dtype) -> case of M = SAMPLES x tokens
CASES: dict[str, Callable[[int, int, torch.dtype], FusedCase]] = {
    "layer": lambda L, K, dtype: _adaln("layer", "", L, K, dtype),
    "layer, modulated": lambda L, K, dtype: _adaln("layer", "sh", L, K, dtype),
    "rms, weight": lambda L, K, dtype: _adaln("rms", "w", L, K, dtype),
    "rms, everything": lambda L, K, dtype: _adaln("rms", "wbsh", L, K, dtype),
    "gelu tanh": lambda L, K, dtype: _gelu("tanh", SAMPLES * L, K, dtype),
    "gelu erf": lambda L, K, dtype: _gelu("none", SAMPLES * L, K, dtype),
    "swiglu": lambda L, K, dtype: _swiglu("two", SAMPLES * L, K, dtype),
    "swiglu, halves": lambda L, K, dtype: _swiglu("halves", SAMPLES * L, K, dtype),
    "swiglu, up first": lambda L, K, dtype: _swiglu("up first", SAMPLES * L, K, dtype),
}
