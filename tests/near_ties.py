"""Values next to ties; and codes of two implementations whose fp32 values differ in the last bits: equal but there."""

from math import log

import torch
from dit_quant.kernels.quantize_activation.reference import quantize_activation, transform


def pairs_on_ties() -> torch.Tensor:
    """[10000, 2] half-integers in order: rows the ends of which, and so zero, often lie on ties."""
    return torch.randint(0, 256, (10_000, 2), generator=torch.Generator().manual_seed(3)).sort(dim=1).values + 0.5


def assert_equal_but_ties(found, y, error, **keywords):
    """found: codes, scale, zero of a fused quantizer; y [M, K] fp32: what the reference quantizes; error [M, K]: how
    far the fused kernel's y may be off; keywords: those of `quantize_activation`.

    A code may differ by 1 where the reference's value lies as close to a tie as the errors reach:
    1. error, divided by smooth; difference and product round once more each, 2 u of their operands (u = 2**-24);
    2. a rotation of order n adds up n of them with weights 1 / sqrt(n): at most sqrt(n) times the largest; a stage
       rounds by 3 u of the largest possible result, on either side;
    3. the range's ends move by as much, and the scale with them.
    """
    order = keywords.get("hadamard", 1)
    shift, smooth = keywords.get("shift"), keywords.get("smooth")
    expected = quantize_activation(y, **keywords)
    v = transform(y, shift, smooth, keywords["index"], keywords["fraction"], order)
    size = y.abs() + (0 if shift is None else shift.float().abs().amax(dim=0))
    slack = error.double() + 2**-22 * size.double()
    largest = size.double()
    if smooth is not None:
        slack, largest = slack / smooth.double(), largest / smooth.double()
    if order > 1:
        slack, largest = (t.unflatten(1, (-1, order)).amax(dim=-1) * order**0.5 for t in (slack, largest))
        slack = (slack + 6 * 2**-24 * log(order, 4) * largest).repeat_interleave(order, dim=1)
    (codes, scale, zero), (codes_, scale_, zero_) = found, expected
    assert (zero is None) == (zero_ is None)
    end = 2 * slack.amax(dim=1, keepdim=True) / (127 if zero is None else 254)
    if keywords.get("static_scale") is not None:
        assert torch.equal(scale, scale_)
        assert zero is None or torch.equal(zero, zero_)
        end = torch.zeros_like(end)
    else:
        assert ((scale.double() - scale_).abs() <= end + 2**-22 * scale_).all()
    steps = v.double() / scale_
    near = (steps - steps.floor() - 0.5).abs()
    allowed = slack / scale_ + steps.abs() * (end / scale_ + 2**-21)
    q, q_ = (c.double() - (0 if z is None else z.double()) for c, z in ((codes, zero), (codes_, zero_)))
    other = (q != q_) & (codes.abs() < 127) & (codes_.abs() < 127)
    assert ((q - q_).abs() <= 1).all()
    assert (near <= allowed)[other].all(), f"{(near - allowed)[other].max()} steps too far from a tie"
    # else the bound would excuse everything
    assert allowed.median() < 0.2, float(allowed.median())
