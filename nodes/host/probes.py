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
from torch.utils._pytree import tree_flatten, tree_unflatten

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

        def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            outputs.append(output)

        def run() -> Tensor:
            found = call(*ordinary(args), **ordinary(dict(kwargs))).detach()
            if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
                raise RuntimeError("the model was not called once, or its output is not one tensor")
            # checked before the gradient is counted in
            difference = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
            if not difference <= TOLERANCE:
                raise RuntimeError(f"under autograd the model's output differs by {difference:.2g}")
            return outputs[0]

        try:
            with ExitStack() as stack:
                stack.enter_context(collector.paused())
                stack.enter_context(training())
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(ordinary_tensors(model, without=blocks))
                stack.enter_context(unchanged_by_later_writes())
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
            load_again(sub)
            for store in (sub._buffers,) if hasattr(sub, "_v") else (sub._parameters, sub._buffers):
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


def load_again(module: nn.Module) -> None:
    """With dynamic VRAM the host multiplies by what it has loaded, not by parameters: it is made to load what it loaded
    in inference mode once more. Nothing is read here, for the memory may have gone to another layer."""
    loaded = (getattr(module, name, None) for name in ("_v_weight", "_v_bias"))
    if any(tensor is not None and tensor.is_inference() for tensor in loaded):
        module._v_signature = None


@contextmanager
def checkpointed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Blocks keep nothing for the way back but their inputs, and copy their weights each time they run."""

    def wrapped(block: nn.Module, forward: Callable) -> Callable:
        def call(*args, **kwargs):
            leaves, form = tree_flatten((args, kwargs))
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

            def run(*tensors: Tensor):
                given = list(leaves)
                for place, tensor in zip(places, tensors, strict=True):
                    given[place] = tensor
                own_args, own_kwargs = tree_unflatten(given, form)
                with ordinary_tensors(block), unchanged_by_later_writes():
                    return forward(*own_args, **own_kwargs)

            anchor = torch.zeros((), requires_grad=True)
            shape: list = []
            outputs = Block.apply(run, shape, anchor, *[leaves[place] for place in places])
            return tree_unflatten(outputs, shape[0])

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


class Block(torch.autograd.Function):
    """Runs without autograd and again, with it, on the way back.

    torch's own checkpoint would not see that a block of the host wrote into what an earlier operation had saved. The
    anchor makes outputs ask for a gradient where no input does: layers inside may want one.
    """

    @staticmethod
    def forward(ctx, run: Callable, shape: list, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.set_materialize_grads(False)  # an output that nothing reads asks for nothing
        ctx.save_for_backward(*tensors)
        outputs, form = tree_flatten(run(*[tensor.clone() for tensor in tensors]))
        shape.append(form)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        wanted = ctx.needs_input_grad[3:]
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, wanted, strict=True)]
            # clones, for no leaf may be written into
            outputs, _ = tree_flatten(ctx.run(*[tensor.clone() for tensor in inputs]))
            # the last block of some models returns None for a stream that ends there
            pairs = [(y, g) for y, g in zip(outputs, gradients, strict=True) if isinstance(y, Tensor)]
            asked = [(y, g) for y, g in pairs if y.requires_grad and g is not None]
            if asked:
                torch.autograd.backward([y for y, _ in asked], [g for _, g in asked])
        return None, None, None, *[tensor.grad for tensor in inputs]


def unchanged_by_later_writes():
    """Autograd keeps copies: the host's blocks add to their inputs in place."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor)


@contextmanager
def training() -> Iterator[None]:
    """Tells the host's blocks to change nothing in place."""
    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before
