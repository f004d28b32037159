"""Upstream-aware targets: each layer is rounded to make up for what the rounded layers before it changed.

After GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695). Letters: x̃ the transformed input of a layer in full
precision, x̂ the same in the rounded model, both before they are rounded to int8.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from dit_quant.demo.experiment import Probe, Prompts
from dit_quant.demo.sampler import guided_velocity
from dit_quant.kernels.quantize_activation.reference import transform
from dit_quant.quant_core.linear import half_if_it_fits
from dit_quant.quant_core.rounding import GPTQ_DAMP
from dit_quant.quant_core.timesteps import TimestepState
from fake_linear import FakeLinear, Layer, fake_copy
from roundings import Rounder
from torch import Tensor, nn

# what feeds what within a block
STAGES = ("qkv", "proj", "fc1", "fc2")


class AllSeen(Exception):
    """Every wanted layer has its input: the rest of the model need not run."""


def inputs_of(model: nn.Module, names: Iterable[str], call: Callable[[], object]) -> dict[str, Tensor]:
    """The inputs of the named layers during call(), which is broken off once all have run."""
    seen: dict[str, Tensor] = {}
    wanted = set(names)

    def hook(name: str):
        def before(module: nn.Module, args: tuple) -> None:
            seen[name] = args[0]
            if len(seen) == len(wanted):
                raise AllSeen

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in wanted]
    try:
        call()
    except AllSeen:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


class PairMoments:
    """Running sums over pairs of x̃ and x̂ [M, K], in float64."""

    def __init__(self, features: int):
        self.count = 0
        self.total = torch.zeros(2, features, dtype=torch.float64)
        self.lost = torch.zeros(features, features, dtype=torch.float64)
        self.seen = torch.zeros(features, features, dtype=torch.float64)

    def add(self, plain: Tensor, rounded: Tensor) -> None:
        self.count += len(plain)
        self.total += torch.stack([plain.sum(dim=0), rounded.sum(dim=0)])
        self.lost += (plain - rounded).T @ rounded
        self.seen += rounded.T @ rounded

    @property
    def means(self) -> Tensor:
        """E[x̃], E[x̂]: [2, K]."""
        return self.total / self.count

    @property
    def cross(self) -> Tensor:
        """Covariance of x̃ - x̂ with x̂, [K, K]."""
        plain, rounded = self.means
        return self.lost / self.count - torch.outer(plain - rounded, rounded)

    @property
    def hessian(self) -> Tensor:
        """Covariance of x̂, [K, K]."""
        return self.seen / self.count - torch.outer(self.means[1], self.means[1])


def upstream_target(weight: Tensor, cross: Tensor, hessian: Tensor, damp: float = GPTQ_DAMP) -> Tensor:
    """W' = W + W E[(x̃ - x̂) x̂ᵀ] Ĥ⁻¹ [N, K]: the weight whose product with x̂ comes closest to W x̃."""
    H = hessian.double()
    H = H + torch.diag(damp * H.diagonal().mean().clamp(min=1e-12).expand(len(H)))
    return (weight.double() @ (torch.eye(len(H), dtype=H.dtype) + torch.linalg.solve(H, cross.double().T).T)).float()


def thinned(prompts: Prompts, count: int) -> Prompts:
    """`count` of them at even distances, or all where there are fewer."""
    total = len(prompts.names)
    count = min(count, total)
    picks = [i * total // count for i in range(count)]
    names = tuple(prompts.names[i] for i in picks)
    return Prompts(names, prompts.context[picks], prompts.pooled[picks], prompts.noise[picks], prompts.empty)


def stages(names: Iterable[str]) -> list[list[str]]:
    """Names in the order of the data: block by block, and both streams of a joint block together."""
    found: dict[tuple[int, int], list[str]] = {}
    for name in names:
        parts = name.split(".")
        found.setdefault((int(parts[1]), STAGES.index(parts[-1])), []).append(name)
    return [found[key] for key in sorted(found)]


@torch.no_grad()  # not inference mode: the state that is made here is updated outside of it
def round_upstream_aware(
    model: nn.Module,
    layers: Mapping[str, Layer],
    rounder: Rounder,
    probes: list[Probe],
    prompts: Prompts,
    cfg: float,
) -> tuple[nn.Module, TimestepState]:
    """Rounds stage by stage on full-precision trajectories; the mean error goes into the correction.

    Only what lies before a layer shows in its x̂, so the layers still to come may hold anything.
    """
    twin, state = fake_copy(model, {n: v.like for n, v in layers.items()}, {n: v.folded() for n, v in layers.items()})
    condition = (prompts.context, prompts.pooled)
    for names in stages(layers):
        pairs = {name: PairMoments(layers[name].weight.shape[1]) for name in names}
        for probe in probes:
            state.update(torch.tensor([probe.sigma]))
            plain, rounded = (
                inputs_of(
                    net, names, lambda n=net, p=probe: guided_velocity(n, p.x, p.sigma, condition, prompts.empty, cfg)
                )
                for net in (model, twin)
            )
            for name in names:
                fake = twin.get_submodule(name)
                pairs[name].add(transformed(plain[name], fake), transformed(rounded[name], fake))
        for name in names:
            settle(twin.get_submodule(name), layers[name], pairs[name], rounder)
    return twin, state


def transformed(x: Tensor, fake: FakeLinear) -> Tensor:
    """x [..., K] -> ((x - z) / s) H [M, K]."""
    w = fake.weight
    return transform(x.reshape(-1, x.shape[-1]), w.shift, w.smooth, *fake.state.select(fake.slot), w.hadamard)


def settle(fake: FakeLinear, layer: Layer, pair: PairMoments, rounder: Rounder) -> None:
    """Rounds one layer towards its target, in place; the correction takes the mean error that is left."""
    weight = layer.folded()
    target = upstream_target(weight, pair.cross, pair.hessian)
    fake.values = rounder(target, pair.hessian[None])
    plain, rounded = pair.means
    lost = weight.double() @ plain - fake.values.double() @ rounded
    old = layer.like.correction
    table = torch.zeros(len(layer.like.groups), len(weight)) if old is None else old
    fake.weight = replace(layer.like, correction=half_if_it_fits(table.double() + lost))
