"""Runs some of the model's calls under autograd, so that the curvature at its layers can be measured.

The host samples in inference mode, whose tensors autograd cannot keep: inputs are copied, and weights for as long as
their block runs. Blocks are checkpointed, so that activations of one block are in memory at a time.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...quant_core.collector import Collector
from ...quant_core.curvature import CurvatureCollector

log = logging.getLogger("dit_quant")
# relative difference of a probed call and the same call of the sampler, above which they are not the same function
TOLERANCE = 0.1


def probing(patcher: ModelPatcher, collector: Collector, curvature: CurvatureCollector, notes: list[str]):
    """-> probe(call, args, kwargs, expected): repeats a call of the model under autograd.

    Where that fails, notes say so, and no further call is probed.
    """
    model = patcher.model.diffusion_model
    blocks = [model.get_submodule(name) for name in block_names(curvature.shapes)]

    def probe(call: Callable[..., Tensor], args: tuple, kwargs: Mapping, expected: Tensor) -> None:
        outputs: list[Tensor] = []
        found: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            outputs.append(output)

        def run() -> Tensor:
            found.append(call(*ordinary(args), **ordinary(dict(kwargs))))
            if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
                raise RuntimeError("the model was not called once, or its output is not one tensor")
            # checked before the gradient is counted in
            difference = float((found[0] - expected).norm() / expected.norm().clamp(min=1e-12))
            if not difference <= TOLERANCE:
                raise RuntimeError(f"under autograd the model's output differs by {difference:.2g}")
            return outputs[0]

        try:
            with ExitStack() as stack:
                stack.enter_context(collector.paused())
                stack.enter_context(training())
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(ordinary_tensors(model, without=blocks))
                stack.enter_context(checkpointed(blocks))
                handle = model.register_forward_hook(keep)
                stack.callback(handle.remove)
                curvature.probe(run)
        except comfy.model_management.InterruptProcessingException:
            raise
        # whatever the model's own code raises under autograd: sampling went well and goes on
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            curvature.give_up(f"{type(error).__name__}: {first}")
            notes.append(curvature.note())
            log.warning("%s", curvature.note())
            comfy.model_management.soft_empty_cache()

    return probe


def block_names(layers: Iterable[str]) -> list[str]:
    """'joint_blocks.3.x_block.mlp.fc1' -> 'joint_blocks.3', of all layers."""
    found = {}
    for name in layers:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is not None:
            found[".".join(parts[: number + 1])] = None
    return list(found)


def ordinary(value):
    """`value` with copies of its inference-mode tensors, in dicts, lists and tuples too."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) is dict:
        return {key: ordinary(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(ordinary(item) for item in value)
    return value


@contextmanager
def ordinary_tensors(module: nn.Module, without: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Copies in place of a module's inference-mode weights and buffers, but for those of the modules `without`."""
    left = {sub for outer in without for sub in outer.modules()}
    kept: list[tuple[dict, str, Tensor]] = []
    try:
        for sub in module.modules():
            if sub in left:
                continue
            for store in (sub._parameters, sub._buffers):
                for key, value in store.items():
                    if value is None or not value.is_inference():
                        continue
                    kept.append((store, key, value))
                    copied = value.detach().clone()
                    parameter = store is sub._parameters
                    store[key] = nn.Parameter(copied, requires_grad=False) if parameter else copied
        yield
    finally:
        for store, key, value in kept:
            store[key] = value


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Blocks keep nothing for the way back but their inputs, and copy their weights each time they run."""

    def wrapped(block: nn.Module, forward: Callable) -> Callable:
        def run(*args, **kwargs):
            with ordinary_tensors(block):
                return forward(*args, **kwargs)

        def call(*args, **kwargs):
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return call

    own = {block: vars(block).get("forward") for block in blocks}
    try:
        for block in own:
            block.forward = wrapped(block, block.forward)
        yield
    finally:
        for block, forward in own.items():
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward


@contextmanager
def training() -> Iterator[None]:
    """Tells the host's blocks to change nothing in place."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before
