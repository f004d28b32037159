"""A quantized MODEL from a MODEL: layers rounded, everything else the artist attached carried over."""

import uuid
from collections.abc import Callable

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...quant_core.calibration import Calibration
from ...quant_core.convert import CannotQuantize, quantize_model
from ...quant_core.report import QuantReport
from ...quant_core.schemes import QuantScheme
from .build import FLOATS, KEY, build_model, select_group
from .weights import float_state, full_state, is_quantized, select, weight_loaders


def compute_dtype(patcher: ModelPatcher) -> torch.dtype:
    """The floating-point type in which the rest of the model is kept."""
    for dtype in (patcher.model.get_dtype(), getattr(patcher.model, "manual_cast_dtype", None)):
        if dtype in FLOATS:
            return dtype
    return torch.bfloat16


def quantize(
    patcher: ModelPatcher,
    scheme: QuantScheme,
    calibration: Calibration | None,
    skip: dict[str, str],
    progress: Callable[[int, int], None],
) -> tuple[ModelPatcher, QuantReport]:
    """Merges the MODEL's patches, rounds, and rebuilds it. The given MODEL is not touched.

    Raises CannotQuantize for a model that is quantized already or patched in a way that cannot be carried over.
    """
    if is_quantized(patcher):
        raise CannotQuantize("this model is quantized already; connect the full-precision model")
    foreign = [name for name in patcher.object_patches if name.startswith("diffusion_model")]
    if foreign:
        raise CannotQuantize(f"{foreign[0]} was replaced by another node; connect Quantize DiT before that node")
    layers, kept, family = select(patcher)
    rounded, report = quantize_model(
        weight_loaders(patcher, layers),
        scheme=scheme,
        calibration=calibration,
        family=family,
        skip=kept | skip,
        progress=progress,
    )
    dtype = compute_dtype(patcher)
    state = full_state(rounded, float_state(patcher, set(rounded), dtype))
    built = build_model(state, None, dtype)
    if type(built.model) is not type(patcher.model):
        was, became = type(patcher.model).__name__, type(built.model).__name__
        raise CannotQuantize(f"the host takes the quantized {was} for a {became}; skip the layers that hold its shape")
    return carry_over(patcher, built), report


def carry_over(source: ModelPatcher, built: ModelPatcher) -> ModelPatcher:
    """A clone of `source` (options, wrappers, object patches, hooks) around the model of `built`."""
    result = source.clone(model_override=built.get_clone_model_override())
    # the weights have the patches in them already
    result.patches = {}
    result.patches_uuid = uuid.uuid4()
    result.clone_base_uuid = uuid.uuid4()
    # a parent is what the host falls back to when a clone dies: the float model must not be it
    result.parent = None
    result.size = 0
    result.cached_patcher_init = built.cached_patcher_init
    result.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    result.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, select_group)
    return result
