"""What a format costs in a layer: gain of the layer x error of the format at its output.

The gain is measured once per layer on the running model: noise at the layer's output, and how far it moves the final
latent. The error of each format is measured on the calibration's row samples, rounded for real on a few channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Choice
from .calibration import Calibration
from .convert import CannotQuantize, LayerInput, layer_groups, quantize_weight, shared_groups
from .linear import HALF_MAX, QuantizedLinear, quant_linear
from .observers import LayerStatistics
from .schemes import PRESETS, QuantScheme
from .timesteps import TimestepGroups, log_snr

# of its output channels, how many of a layer are rounded to judge a format
CHANNELS = 128
KEPT = "16 bits"
_W4 = PRESETS["W4A8"]
FORMATS = {
    "W8A8": PRESETS["W8A8"],
    **{
        f"W4A8 g{size}": _W4.with_options(
            name=f"W4A8 g{size}", weights=_W4.weights.with_options(group_size=size)
        )
        for size in (16, 32, 64)
    },
}
# fields whose size grows with the output channels
CHANNEL_FIELDS = ("qdata", "scale", "levels", "column_sum", "correction")


def nearest_probe(sigma: float, probes: Sequence[float], flow: bool) -> int:
    """The probe closest in log-SNR."""
    position = log_snr(sigma, flow)
    return min(range(len(probes)), key=lambda j: abs(log_snr(probes[j], flow) - position))


def output_error(
    weight: Tensor, layer: QuantizedLinear, statistics: LayerStatistics, sigmas: Sequence[float], channels: Tensor
) -> Tensor:
    """Mean squared error of the layer's output at every calibrated sigma [T], fp64, on the row samples.

    weight [N, K]; layer: the rounded weight[channels].
    """
    rows, row_bin = statistics.rows, statistics.row_bin
    assert rows is not None and row_bin is not None
    part = weight[channels].float()
    found = torch.full((len(sigmas),), torch.nan, dtype=torch.float64)
    for t, sigma in enumerate(sigmas):
        x = rows[row_bin == t].float()
        if len(x):
            index, fraction = layer.groups.locate(sigma)
            y = quant_linear(x, layer, None, torch.tensor([index]), torch.tensor([fraction]))
            found[t] = (y - x @ part.T).double().square().mean()
    return found
