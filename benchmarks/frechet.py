"""Do the samples of a rounded model come from the same distribution? Frechet and kernel distances of features.

    python benchmarks/frechet.py --model emoji --out benchmarks/results/frechet_emoji.json [--quick] [--samples N]

Needs `pip install -e .[bench]`. The reference is full precision at one set of seeds; every row is sampled at another,
full precision too: its distance is the floor, which the number of samples alone makes. Rows share their seeds, so how
far they are above the floor is known better than the distances themselves.

Calibrated as in quality.py. Prompts are those that calibration never saw, each as often as another to within one.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from dit_quant.demo.experiment import Prompts, Sampling, draw, prepare, quantized_copy, spread, update_with
from dit_quant.demo.pixels import to_rgb
from dit_quant.demo.prompts import PromptTable
from dit_quant.quant_core.calibration import Calibration
from dit_quant.quant_core.schemes import PRESETS
from features import (
    LAYER,
    NETWORK,
    PACKAGES,
    feature_vectors,
    frechet_distance,
    kernel_terms,
    load_features,
    perceptual_distance,
)
from off_grid import Method
from provenance import provenance
from quality import BASELINES, DRAWS, MODELS, WAN, calibrated, ratio_interval, updated, wanted
from rivals import rivals
from scipy import stats
from torch import Tensor, nn

FLOOR = "full precision"
# W4A4 visibly breaks the pictures: a measure that does not see it sees nothing
RIVALS = ("native int8", "native int8 + ConvRot", "native asym_w4a8_int8", "native convrot_w4a4")
OURS = ("W8A8", "W8A8 static", "W4A8", "htg_paper")
# far from the seeds of calibration and of quality.py
REFERENCE_SEED, ROW_SEED = 100_000, 200_000
PARTS = 16


@dataclass(frozen=True)
class Samples:
    """Pictures [n, 3, h, w] in 0..1, their features [n, D], and which prompt each is of: [n] in 0..P-1."""

    pictures: Tensor
    vectors: Tensor
    prompts: Tensor


@dataclass(frozen=True)
class Figures:
    """One method against the reference: `without` [parts] leaves out a part of the prompts, `terms` is [P, P].

    perceptual: [P], one picture per prompt against full precision from the same noise.
    """

    bits_per_weight: float
    groups: int
    frechet: float
    without: np.ndarray
    terms: np.ndarray
    perceptual: np.ndarray


def methods(model: nn.Module, calibration: Calibration) -> Iterator[tuple[str, Method]]:
    """Built one at a time, in the order of the table."""
    yield FLOOR, Method(model, None, 32.0)
    builders = rivals()
    for name in RIVALS:
        rival = builders[name](model, calibration)
        yield name, Method(rival.model, None, rival.bits_per_weight)
    for name in OURS:
        twin, state, report = quantized_copy(model, calibration, PRESETS[name])
        yield name, Method(twin, update_with(state), report.bits_per_weight, report.groups)


def repeated(table: PromptTable, samples: int, first_seed: int) -> tuple[Prompts, Tensor]:
    """Prompts for that many samples, and which of the chosen prompts each is: [samples]. Every one comes twice or more.

    The first P samples are one of each.
    """
    held_out = list(table.prompts[1::2])
    names = spread(held_out, min(len(held_out), samples // 2), "evaluation")
    order = torch.arange(samples) % len(names)
    return prepare(table, [names[i] for i in order.tolist()], first_seed), order


@torch.inference_mode()
def sampled(method: Method, prompts: Prompts, order: Tensor, sampling: Sampling) -> Samples:
    """`order`: which prompt each sample is of."""
    pictures = to_rgb(draw(method.model, prompts, sampling, method.before_step))
    return Samples(pictures, feature_vectors(pictures), order)


def compare(method: Method, found: Samples, reference: Samples, same_noise: Samples) -> Figures:
    """Distances to the reference, and perceptual ones to full precision from the same noise."""
    count = int(found.prompts.max()) + 1
    parts = min(PARTS, count)
    without = []
    for part in range(parts):
        kept, kept_reference = (s.vectors[s.prompts % parts != part] for s in (found, reference))
        without.append(frechet_distance(kept, kept_reference))
    return Figures(
        method.bits_per_weight,
        method.groups,
        frechet_distance(found.vectors, reference.vectors),
        np.array(without),
        kernel_terms(found.vectors, reference.vectors, found.prompts, reference.prompts).numpy(),
        perceptual_distance(found.pictures[:count], same_noise.pictures[:count]).numpy(),
    )


def jackknife(value: float, without: np.ndarray) -> list[float]:
    """[value, 2.5 %, 97.5 %] by Student's t on the jackknife's standard error; `without`: the value less each part.

    A bootstrap would not do for the Frechet distance: repeated samples are fewer samples, which raise it.
    """
    parts = len(without)
    error = np.sqrt((parts - 1) / parts * np.square(without - without.mean()).sum())
    reach = float(stats.t.ppf(0.975, parts - 1) * error)
    return [value, value - reach, value + reach]


def bootstrap(terms: np.ndarray, seed: int = 0) -> list[float]:
    """[mean, 2.5 %, 97.5 %] of terms [P, P] over resampled prompts. It is wide near 0, where terms nearly cancel."""
    count = len(terms)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS) / count
    draws = ((weights @ terms) * weights).sum(axis=1)
    # a prompt drawn twice meets itself: the diagonal counts about twice on average
    draws -= (terms.diagonal().mean() - terms.mean()) / count
    return [float(terms.mean()), *(float(q) for q in np.quantile(draws, (0.025, 0.975)))]


def row(label: str, figures: dict[str, Figures]) -> dict:
    """Distances with 95 % intervals, and how far they are above the floor; perceptual against the native format."""
    found, floor = figures[label], figures[FLOOR]
    result = {
        "method": label,
        "bits_per_weight": round(found.bits_per_weight, 3),
        "groups": found.groups,
        "frechet": jackknife(found.frechet, found.without),
        "kernel": bootstrap(found.terms),
        "perceptual": float(found.perceptual.mean()),
    }
    if label != FLOOR:
        result["frechet_over_floor"] = jackknife(found.frechet - floor.frechet, found.without - floor.without)
        result["kernel_over_floor"] = bootstrap(found.terms - floor.terms)
        baseline = BASELINES[8 if found.bits_per_weight > 6 else 4]
        if baseline in figures:
            result["baseline"] = baseline
            result["perceptual_ratio"] = ratio_interval(found.perceptual, figures[baseline].perceptual)
    return result


def run(
    name: str, samples: int, steps: int, calibration_prompts: int, calibration_steps: int, wan: Path, only: str = ""
) -> dict:
    """only: see `wanted`; full precision is always there."""
    sampling = Sampling(steps=steps, batch=32)
    load_features()  # missing packages show before the work, not after it
    model, table, calibration = calibrated(name, wan, calibration_prompts, Sampling(steps=calibration_steps))
    reference = sampled(Method(model, None, 32.0), *repeated(table, samples, REFERENCE_SEED), sampling)
    prompts, order = repeated(table, samples, ROW_SEED)
    figures: dict[str, Figures] = {}
    floor = None
    for label, method in methods(model, calibration):
        if label != FLOOR and not wanted(label, only):
            continue
        found = sampled(method, prompts, order, sampling)
        floor = found if floor is None else floor
        figures[label] = compare(method, found, reference, floor)
        report_line(row(label, figures))
    return {
        "model": name,
        **provenance("comfy-kitchen", *PACKAGES),
        "settings": {
            "samples": samples,
            "prompts": int(order.max()) + 1,
            "calibration_prompts": calibration_prompts,
            "calibration_steps": calibration_steps,
            "steps": sampling.steps,
            "cfg": sampling.cfg,
            "shift": sampling.shift,
            "feature_network": NETWORK,
            "feature_layer": LAYER,
            "reference_seed": REFERENCE_SEED,
            "row_seed": ROW_SEED,
        },
        # once more, since a baseline may come after its rows
        "rows": [row(label, figures) for label in figures],
    }


def report_line(found: dict) -> None:
    spans = ("frechet", "frechet_over_floor", "kernel", "kernel_over_floor")
    figures = "  ".join(f"{k} {found[k][0]:.4g} [{found[k][1]:.4g}, {found[k][2]:.4g}]" for k in spans if k in found)
    print(f"{found['method']:24s} {figures}  perceptual {found['perceptual']:.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="emoji")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="16 samples, 3 steps, 4 calibration prompts: does it run?")
    parser.add_argument("--samples", type=int, help="default 640; 16 with --quick")
    parser.add_argument("--wan", type=Path, default=WAN, help="folder that train_fixture.py --layout wan wrote")
    parser.add_argument("--only", default="", help="as in quality.py; name the native format of the same width too")
    parser.add_argument("--update", action="store_true", help="keep the other rows of --out")
    args = parser.parse_args()
    samples, steps, prompts, calibration_steps = (16, 3, 4, 3) if args.quick else (640, 12, 96, 28)
    samples = samples if args.samples is None else args.samples
    if samples < 4:
        parser.error(f"--samples {samples}: two prompts of two samples each are the least")
    result = run(args.model, samples, steps, prompts, calibration_steps, args.wan, args.only)
    if args.update:
        result = updated(json.loads(args.out.read_text()), result)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
