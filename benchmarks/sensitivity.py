"""Is the predicted error of a layer the one that it causes? Every layer rounded alone, and the final latents compared.

    python benchmarks/sensitivity.py --model emoji --out benchmarks/results/sensitivity_emoji.json [--quick]

predicted: gain x error on the row samples (quant_core/mixed.py); measured: relative L2 of the final latent on prompts
that calibration never saw. Rank correlations over all layers.
"""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

from dit_quant.demo.experiment import Sampling, draw, prepare, quantizable, quantized_copy, spread, update_with
from dit_quant.demo.mixed import measure_gains
from dit_quant.quant_core.calibration import Calibration
from dit_quant.quant_core.convert import layer_groups, shared_groups
from dit_quant.quant_core.mixed import price
from dit_quant.quant_core.schemes import PRESETS, QuantScheme
from dit_quant.quant_core.sensitivity import relative_energy
from quality import MODELS, WAN, calibrated
from scipy.stats import spearmanr
from torch import nn

SCHEMES = ("W4A8", "W8A8")


def layer_errors(model: nn.Module, scheme: QuantScheme, calibration: Calibration, prompts, sampling: Sampling) -> dict:
    """Layer name -> [predicted, measured] relative L2 of the final latent with this layer alone rounded."""
    reference = draw(model, prompts, sampling)
    twin, state, _ = quantized_copy(model, calibration, scheme)
    shared = shared_groups(scheme, calibration)
    errors = {}
    for name, layer in quantizable(model)[0].items():
        groups = layer_groups(name, scheme, calibration, shared)
        predicted = price(name, layer.weight, scheme, calibration, groups, in_file=False).error
        one = copy.deepcopy(model)
        parent, _, child = name.rpartition(".")
        setattr(one.get_submodule(parent), child, twin.get_submodule(name))
        measured = relative_energy(draw(one, prompts, sampling, update_with(state)), reference)
        errors[name] = [predicted**0.5, measured**0.5]
    return errors


def run(name: str, prompts: int, steps: int, calibration_prompts: int, wan: Path) -> dict:
    sampling = Sampling(steps=steps)
    model, table, calibration = calibrated(name, wan, calibration_prompts, sampling)
    seen = prepare(table, spread(list(table.prompts[0::2]), calibration_prompts, "calibration"), 0)
    calibration = replace(calibration, gains=measure_gains(model, seen, sampling))
    unseen = prepare(table, spread(list(table.prompts[1::4]), prompts, "evaluation"), 10_000)
    result = {"model": name, "calibration_prompts": calibration_prompts, "prompts": prompts, "steps": steps}
    for scheme in SCHEMES:
        errors = layer_errors(model, PRESETS[scheme], calibration, unseen, sampling)
        rank = float(spearmanr(*zip(*errors.values(), strict=True))[0])
        print(f"{name} {scheme}: rank correlation {rank:.3f} over {len(errors)} layers", flush=True)
        result[scheme] = {"rank_correlation": rank, "layers": errors}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="emoji")
    parser.add_argument("--wan", type=Path, default=WAN, help="folder that train_fixture.py --layout wan wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="2 prompts, 4 steps: does it run?")
    args = parser.parse_args()
    result = run(args.model, *((2, 4, 4) if args.quick else (6, 28, 96)), wan=args.wan)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
