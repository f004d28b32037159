"""What 8-bit tokens would gain if their few strongest directions were kept in 16 bits: an experiment, not a preset.

    python benchmarks/directions.py --out benchmarks/results/directions.json [--quick] [--model emoji|emoji_wan]

x̃ = U p + r with U [K, R] the leading eigenvectors of the rounding Hessian and p = Uᵀ x̃. W̃ U p is added in floating
point; only r is quantized, and W̃ is rounded under the Hessian of r. The rest is the W8A8 preset, prompts, noise and
intervals are those of quality.py's development set. Bits per weight count U and W̃ U in 16 bits.
"""

import argparse
import copy
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from dit_quant.demo.experiment import draw, prepare, reference_velocities, spread, update_with
from dit_quant.kernels.numerics import lerp_rows
from dit_quant.kernels.quantize_activation.reference import asymmetric_range, encode, transform
from dit_quant.quant_core.convert import install
from dit_quant.quant_core.linear import QuantLinear, codes_of
from dit_quant.quant_core.rounding import round_weight
from dit_quant.quant_core.schemes import PRESETS
from dit_quant.quant_core.timesteps import TimestepState
from fake_linear import Layer, unrounded
from quality import WAN, Sampling, Setting, calibrated, measure, ratio_interval
from rivals import kitchen
from torch import Tensor, nn

SCHEME = PRESETS["W8A8"]
RIVAL = "native int8 + ConvRot"
RANKS = (0, 1, 2, 4, 8, 16, 32)


class DirectedLinear(QuantLinear):
    """A QuantLinear with `values` [N, K] fp32 for its weight, and `directions` U [K, R] of its tokens set apart."""

    def __init__(self, like: QuantLinear, values: Tensor, directions: Tensor, branch: Tensor):
        super().__init__(like.weight, like.bias, like.state, like.slot)
        self.values, self.directions, self.branch = values, directions, branch

    def forward(self, x: Tensor) -> Tensor:
        w, (index, fraction) = self.weight, self.state.select(self.slot)
        tokens = transform(x.reshape(-1, x.shape[-1]), w.shift, w.smooth, index, fraction, w.hadamard)
        p = tokens @ self.directions
        rest = tokens - p @ self.directions.T
        scale, zero = asymmetric_range(rest.amin(dim=-1, keepdim=True), rest.amax(dim=-1, keepdim=True))
        y = ((encode(rest, scale, zero).float() - zero) * scale) @ self.values.T + p @ self.branch.T
        if self.bias is not None:
            y = y + self.bias
        if w.correction is not None:
            y = y + lerp_rows(w.correction, index, fraction)
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)


def split(layer: Layer, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """-> rounded weight [N, K], U [K, R], W̃ U [N, R], and the share of the tokens' energy along U."""
    folded, blocks = layer.folded(), layer.hessian()
    width, hessian = blocks.shape[-1], torch.block_diag(*blocks).double()
    values, vectors = torch.linalg.eigh(hessian)
    U = vectors[:, len(values) - rank :]
    rest = hessian - U @ (values[len(values) - rank :, None] * U.T)
    blocks = torch.stack([rest[i : i + width, i : i + width] for i in range(0, len(rest), width)]).to(blocks.dtype)
    rounded = round_weight(folded, SCHEME.weights, folded.shape[1], blocks if rank else layer.hessian())
    energy = float(values[len(values) - rank :].sum() / values.sum())
    return rounded.qdata.float() * rounded.scale, U.float(), (folded.double() @ U).float(), energy


def directed_copy(model: nn.Module, layers: Mapping[str, Layer], rank: int) -> tuple[nn.Module, TimestepState, dict]:
    """The model with `rank` directions set apart in every layer; bits per weight and mean share of the energy."""
    twin = copy.deepcopy(model)
    state = install(twin, {name: layer.like for name, layer in layers.items()})
    size, weights, shares = 0, 0, []
    for name, layer in layers.items():
        values, directions, branch, share = split(layer, rank)
        parent, _, child = name.rpartition(".")
        linear = DirectedLinear(twin.get_submodule(name), values, directions, branch)
        setattr(twin.get_submodule(parent), child, linear)
        size += layer.like.nbytes + 2 * (directions.numel() + branch.numel())
        weights += codes_of(layer.like).numel()
        shares.append(share)
    return twin, state, {"bits_per_weight": 8 * size / weights, "energy_share": float(np.mean(shares))}


def run(name: str, wan: Path, prompts: int, steps: int, calibration_prompts: int) -> dict:
    sampling = Sampling(steps=steps)
    model, table, calibration = calibrated(name, wan, calibration_prompts, sampling)
    evaluation = prepare(table, spread(list(table.prompts[1::4]), prompts, "evaluation"), 10_000)
    setting = Setting(
        evaluation, sampling, draw(model, evaluation, sampling), reference_velocities(model, evaluation, sampling)
    )
    base = measure(kitchen(model, RIVAL).model, None, setting, pictures=False)["velocity"]
    layers, rows = unrounded(model, calibration, SCHEME), []
    for rank in RANKS:
        twin, state, figures = directed_copy(model, layers, rank)
        found = measure(twin, update_with(state), setting, pictures=False)["velocity"]
        rows.append({"rank": rank, **figures, "velocity": float(found.mean()), "ratio": ratio_interval(found, base)})
        print({key: np.round(value, 4).tolist() for key, value in rows[-1].items()}, flush=True)
    return {
        "model": name,
        "versions": {p: metadata.version(p) for p in ("torch", "numpy", "comfy-kitchen", "dit-quant")},
        "machine": {"torch_threads": torch.get_num_threads()},
        "settings": {
            "evaluation_prompts": list(evaluation.names),
            "calibration_prompts": calibration_prompts,
            "steps": steps,
            "cfg": sampling.cfg,
            "set": "development",
            "baseline": RIVAL,
        },
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=("emoji", "emoji_wan"), default="emoji")
    parser.add_argument("--wan", type=Path, default=WAN, help="folder of the trained Wan-layout files")
    parser.add_argument("--quick", action="store_true", help="4 prompts, 8 steps: does it run?")
    args = parser.parse_args()
    result = run(args.model, args.wan, *((4, 8, 4) if args.quick else (16, 28, 96)))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
