"""Methods that were tried and not adopted, against W4A8 with plain GPTQ on the bundled emoji DiT.

    python benchmarks/alternatives.py --out benchmarks/results/alternatives.json [--quick] [--only NAME]

Calibration, prompts and noise are those of quality.py's development set; a paired bootstrap interval over prompts goes
with every ratio to the preset. It does not show how much luck there is in one rounding: the rows on damping do.
Methods without an integer format run through fake_linear.py, at the size that they would have. Rows marked `reference`
are no rejected methods, but what the row before them is to be compared with.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from dit_quant.demo.emoji_dit import load_emoji_dit
from dit_quant.demo.experiment import (
    COVARIANCE_LIMIT,
    Prompts,
    Sampling,
    calibrate,
    draw,
    prepare,
    quantized_copy,
    reference_velocities,
    spread,
    update_with,
)
from dit_quant.demo.prompts import load_prompt_table
from dit_quant.quant_core.architectures import FAMILIES, Role, family_of
from dit_quant.quant_core.calibration import Calibration
from dit_quant.quant_core.convert import install
from dit_quant.quant_core.linear import QuantizedLinear
from dit_quant.quant_core.schemes import PRESETS, Rounding, Shift
from dit_quant.quant_core.timesteps import TimestepState
from fake_linear import Layer, fake_copy, unrounded
from provenance import provenance
from quality import Setting, measure, ratio_interval
from roundings import (
    NF4,
    Rounder,
    branch_bytes,
    gptq_decoded,
    gptq_table,
    gptq_then_descent,
    gptq_with_branch,
    lloyd_max,
)
from scale_search import by_maxima, search_strength
from step_weights import step_lengths, weighted_moments, weighted_statistics
from torch import Tensor, nn
from upstream import round_upstream_aware, thinned

ASSETS = Path(__file__).resolve().parents[1] / "demo" / "assets"
# what these methods were tried on: the preset before errors in several channels made up for one another
BASELINE = "W4A8 with plain GPTQ"
_W4 = PRESETS["W4A8"]
PRESET = _W4.with_options(weights=_W4.weights.with_options(rounding=Rounding.GPTQ))
GROUP = PRESET.weights.group_size
GPTQ = partial(gptq_decoded, group_size=GROUP)
RANK = 16
POWERS = (1, 2)
# teacher-forced moments: so many of the calibration prompts, one step in three
UPSTREAM_PROMPTS, UPSTREAM_STRIDE = 32, 3


@dataclass(frozen=True)
class Rounded:
    """A rounded copy of the model, what selects its groups, and its bits per weight with every table."""

    model: nn.Module
    state: TimestepState
    bits_per_weight: float


@dataclass(frozen=True)
class Bench:
    """The model and its calibration. What only some methods need is computed when first asked for."""

    model: nn.Module
    prompts: Prompts
    sampling: Sampling
    calibration: Calibration

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """What the preset rounds."""
        return unrounded(self.model, self.calibration, PRESET)

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Second moments [P, B, b, b] weighted by step length to each of POWERS."""
        weights = torch.stack([step_lengths(self.sampling, power) for power in POWERS])
        return weighted_moments(self.model, self.prompts, self.sampling, self.layers, weights, COVARIANCE_LIMIT)

    @cached_property
    def strengths(self) -> dict[str, dict[str, tuple[QuantizedLinear, Tensor]]]:
        """By layer and criterion, see `search_strength`."""
        return {name: search_strength(layer, self.calibration.sigmas, GPTQ) for name, layer in self.layers.items()}

    def scheme(self, **changes) -> Rounded:
        """The preset with other options."""
        twin, state, report = quantized_copy(self.model, self.calibration, PRESET.with_options(**changes))
        return Rounded(twin, state, report.bits_per_weight)

    def fake(self, likes: Mapping[str, QuantizedLinear], values: Mapping[str, Tensor], extra: int = 0) -> Rounded:
        """`values` are the rounded weights; they take the bytes of `likes`, and `extra` more in all."""
        return Rounded(*fake_copy(self.model, likes, values), bits_per_weight(likes, extra))

    def rounded(self, rounder: Rounder, layers: Mapping[str, Layer], extra: int = 0) -> Rounded:
        values = {name: rounder(layer.folded(), layer.hessian()) for name, layer in layers.items()}
        return self.fake({name: layer.like for name, layer in layers.items()}, values, extra)


def bits_per_weight(layers: Mapping[str, QuantizedLinear], extra: int = 0) -> float:
    size = sum(layer.nbytes for layer in layers.values()) + extra
    return 8 * size / sum(math.prod(layer.features) for layer in layers.values())


def rounded_by(rounder: Callable, **options) -> Callable[[Bench], Rounded]:
    """Another rounder, all else as in the preset."""
    return lambda bench: bench.rounded(partial(rounder, group_size=GROUP, **options), bench.layers)


def with_group(size: int) -> Callable[[Bench], Rounded]:
    return lambda bench: bench.scheme(weights=PRESET.weights.with_options(group_size=size))


def with_options(**changes) -> Callable[[Bench], Rounded]:
    return lambda bench: bench.scheme(**changes)


def with_branch(bench: Bench) -> Rounded:
    extra = sum(branch_bytes(layer.like.features, RANK) for layer in bench.layers.values())
    return bench.rounded(partial(gptq_with_branch, group_size=GROUP, rank=RANK), bench.layers, extra)


def upstream_aware(bench: Bench) -> Rounded:
    prompts = thinned(bench.prompts, UPSTREAM_PROMPTS)
    count = max(2, math.ceil(bench.sampling.steps / UPSTREAM_STRIDE))
    probes = reference_velocities(bench.model, prompts, bench.sampling, probes=count)
    found = round_upstream_aware(bench.model, bench.layers, GPTQ, probes, prompts, bench.sampling.cfg)
    return Rounded(*found, bits_per_weight({name: layer.like for name, layer in bench.layers.items()}))


def step_weighted(power: int) -> Callable[[Bench], Rounded]:
    """Another Hessian; shift and scale stay those of the preset."""
    row = POWERS.index(power)

    def build(bench: Bench) -> Rounded:
        weights = step_lengths(bench.sampling, power)
        layers = {
            name: replace(layer, statistics=weighted_statistics(layer.statistics, bench.moments[name][row], weights))
            for name, layer in bench.layers.items()
        }
        return bench.rounded(GPTQ, layers)

    return build


def searched(criterion: str) -> Callable[[Bench], Rounded]:
    def build(bench: Bench) -> Rounded:
        chosen = {name: found[criterion] for name, found in bench.strengths.items()}
        return bench.fake(
            {n: like for n, (like, _) in chosen.items()}, {n: values for n, (_, values) in chosen.items()}
        )

    return build


def scaled_by_maxima(strength: float) -> Callable[[Bench], Rounded]:
    return lambda bench: bench.rounded(GPTQ, {n: by_maxima(layer, strength) for n, layer in bench.layers.items()})


def rotated_where_unmodulated(bench: Bench) -> Rounded:
    """No rotation where adaLN feeds: there the modulation could take shift and scale in at no cost at run time."""
    family = family_of(bench.model.state_dict(), FAMILIES)
    full, plain = (bench.scheme(hadamard=order).model for order in (PRESET.hadamard, 1))
    layers = {
        name: (plain if family.role(name) is Role.MODULATED else full).get_submodule(name).weight
        for name in bench.layers
    }
    twin = copy.deepcopy(bench.model)
    return Rounded(twin, install(twin, layers), bits_per_weight(layers))


@dataclass(frozen=True)
class Method:
    """reference: not rejected, but a comparison; latents: aimed at the final latents, so judged by them too."""

    build: Callable[[Bench], Rounded]
    reference: bool = False
    latents: bool = False


def methods() -> dict[str, Method]:
    """The baseline comes first."""
    return {
        BASELINE: Method(with_options(), reference=True, latents=True),
        "W4A8, guided by the curvature": Method(with_options(weights=_W4.weights), reference=True, latents=True),
        # hardly another method: how far two equally good roundings lie apart, which no interval over prompts shows
        "damping 0.06 in place of 0.05": Method(rounded_by(gptq_decoded, damp=0.06), reference=True),
        "damping 0.04 in place of 0.05": Method(rounded_by(gptq_decoded, damp=0.04), reference=True),
        "16 levels by Lloyd-Max": Method(rounded_by(gptq_table, table=lloyd_max(GROUP))),
        "16 levels of NF4": Method(rounded_by(gptq_table, table=torch.tensor(NF4))),
        "upstream-aware targets": Method(upstream_aware),
        "16-bit branch of rank 16": Method(with_branch),
        "no branch, groups of 8": Method(with_group(8), reference=True),
        "no branch, groups of 4": Method(with_group(4), reference=True),
        "Hessian weighted by step": Method(step_weighted(1), latents=True),
        "Hessian weighted by squared step": Method(step_weighted(2), latents=True),
        "coordinate descent after GPTQ": Method(rounded_by(gptq_then_descent)),
        "scale strength by output error": Method(searched("output error")),
        "scale strength by Hessian loss": Method(searched("Hessian loss")),
        "scale by maxima": Method(scaled_by_maxima(1.0)),
        "scale by maxima, half strength": Method(scaled_by_maxima(0.5)),
        "mid-range shift, no rotation": Method(with_options(shift=Shift.MIDRANGE, hadamard=1)),
        "mean shift, no rotation": Method(with_options(hadamard=1), reference=True),
        "rotation only behind no modulation": Method(rotated_where_unmodulated),
        "rotation in blocks of 64": Method(with_options(hadamard=64)),
        "rotation in blocks of 16": Method(with_options(hadamard=16)),
    }


def row(
    name: str, method: Method, bits: float, found: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]
) -> dict:
    """Means, and ratios to the baseline with 95 % intervals."""
    result = {"method": name, "reference": method.reference, "bits_per_weight": round(bits, 3)}
    for figure in ("velocity", "latent") if method.latents else ("velocity",):
        result[figure] = float(found[figure].mean())
        result[f"{figure}_ratio"] = ratio_interval(found[figure], base[figure])
    return result


def report_line(row: dict) -> str:
    figures = []
    for figure in ("velocity", "latent"):
        if figure in row:
            ratio, low, high = row[f"{figure}_ratio"]
            figures.append(f"{figure} {row[figure]:.4f} ({ratio:.3f}x, {low:.3f} to {high:.3f})")
    return f"{row['method']:36s} {row['bits_per_weight']:5.2f} bits  {'  '.join(figures)}"


def run(prompts: int, steps: int, calibration_prompts: int, only: str) -> dict:
    model = load_emoji_dit(ASSETS / "emoji_dit.safetensors")
    table = load_prompt_table(ASSETS / "emoji_prompts.safetensors")
    sampling = Sampling(steps=steps)
    calibration_set = prepare(table, spread(list(table.prompts[0::2]), calibration_prompts, "calibration"), 0)
    calibration, _ = calibrate(model, calibration_set, sampling)
    bench = Bench(model, calibration_set, sampling, calibration)
    # the development set of quality.py
    evaluation = prepare(table, spread(list(table.prompts[1::4]), prompts, "evaluation"), 10_000)
    setting = Setting(
        evaluation, sampling, draw(model, evaluation, sampling), reference_velocities(model, evaluation, sampling)
    )
    base, rows = None, []
    for name, method in methods().items():
        if only in name or name == BASELINE:
            rounded = method.build(bench)
            found = measure(rounded.model, update_with(rounded.state), setting, pictures=method.latents)
            base = found if base is None else base
            rows.append(row(name, method, rounded.bits_per_weight, found, base))
            print(report_line(rows[-1]), flush=True)
    return {
        "model": "emoji",
        **provenance(),
        "settings": {
            "evaluation_prompts": list(evaluation.names),
            "calibration_prompts": calibration_prompts,
            "steps": steps,
            "cfg": sampling.cfg,
            "set": "development",
            "baseline": BASELINE,
        },
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="4 prompts, 8 steps: does it run?")
    parser.add_argument("--only", default="", help="methods whose name contains this, beside the preset")
    args = parser.parse_args()
    prompts, steps, calibrated = (4, 8, 4) if args.quick else (16, 28, 96)
    result = run(prompts, steps, calibrated, args.only)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
