"""A quantized MODEL from a MODEL: layers rounded, everything else the artist attached carried over."""

import uuid
from collections.abc import Callable

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...quant_core.calibration import Calibration
from ...quant_core.checkpoint import header_bytes
from ...quant_core.convert import CannotQuantize, quantize_model
from ...quant_core.mixed import Plan, plan_formats
from ...quant_core.report import QuantReport
from ...quant_core.schemes import QuantScheme
from .attached import refuse_bypass, refuse_copies, refuse_holders, refuse_hook_loras
from .build import FLOATS, KEY, build_model, select_group
from .detection import detection_metadata, difference
from .weights import float_state, full_state, is_quantized, quantized_state, select, smallest_exact, weight_loaders

# a file holds the workflow that made it
WORKFLOW_BYTES = 2**16


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
    size: int | None = None,
    backend: str = "auto",
) -> tuple[ModelPatcher, QuantReport]:
    """Merges the MODEL's patches, rounds, and rebuilds it. The given MODEL is not touched.

    size: bytes that the whole model may take in a file; every layer then gets a format of its own.
    backend: what multiplies the layers of the result.

    Raises CannotQuantize and CannotCarry for a model that is quantized already or patched in a way that cannot be
    carried over.
    """
    if is_quantized(patcher):
        raise CannotQuantize("this model is quantized already; connect the full-precision model")
    refuse_bypass(patcher)
    refuse_copies(patcher)
    refuse_holders(patcher)
    foreign = [name for name in patcher.object_patches if name.startswith("diffusion_model")]
    if foreign:
        raise CannotQuantize(f"{foreign[0]} was replaced by another node; connect Quantize DiT before that node")
    layers, kept, family = select(patcher)
    loaders = weight_loaders(patcher, layers)
    plan = None if size is None else fit(patcher, set(layers) - set(skip), calibration, size, progress)
    rounded, report = quantize_model(
        loaders,
        scheme=scheme,
        calibration=calibration,
        family=family,
        skip=kept | skip,
        schemes=None if plan is None else plan.schemes,
        progress=progress,
    )
    report = report if plan is None else plan.report(report)
    dtype = compute_dtype(patcher)
    state = full_state(rounded, float_state(patcher, set(rounded), dtype))
    metadata = detection_metadata(patcher, state)
    built = build_model(state, metadata, dtype, backend)
    if wrong := difference(patcher, built):
        raise CannotQuantize(f"the host reads {wrong} off the quantized tensors; skip the layers that hold this shape")
    result = carry_over(patcher, built)
    if result.is_dynamic():
        # the host streams weights out of these very tensors
        result.cached_patcher_init = (build_model, (state, metadata, dtype, backend))
    else:
        # it moves the model, and would leave them behind
        result.cached_patcher_init = (build_again, (built, metadata, dtype, backend))
    return result, report


def build_again(
    built: ModelPatcher,
    metadata: dict[str, str],
    dtype: torch.dtype,
    backend: str,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Another model like that of `built`, a MODEL without patches, in tensors of its own: for copies that the host
    makes. What other clones have patched into it by now is left out."""
    layers = quantized_state(built)
    state = full_state(layers, float_state(built, set(layers), dtype))
    del layers
    for name in state:
        state[name] = state[name].clone()
    return build_model(state, metadata, dtype, backend, disable_dynamic)


def fit(
    patcher: ModelPatcher,
    names: set[str],
    calibration: Calibration | None,
    size: int,
    progress: Callable[[int, int], None],
) -> Plan:
    """The formats of the layers `names` with which the saved model takes at most `size` bytes."""
    if calibration is None:
        raise CannotQuantize("fitting to a size needs a calibration; connect Calibrate DiT, measure_sensitivity on")
    dtype = compute_dtype(patcher)
    floats = float_state(patcher, names, dtype)
    fixed = sum(smallest_exact(value).nbytes + header_bytes(name) for name, value in floats.items())
    del floats
    return plan_formats(
        weight_loaders(patcher, sorted(names)),
        calibration,
        size,
        fixed=fixed + WORKFLOW_BYTES,
        kept_bytes=lambda weight: smallest_exact(weight.to(dtype)).nbytes,
        in_file=True,
        progress=progress,
    )


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
    refuse_hook_loras(result)
    result.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    result.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, select_group)
    return result
