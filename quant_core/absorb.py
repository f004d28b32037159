"""Shift and scale moved into the producers of a layer's input, so that they cost nothing at run time.

adaLN emits the modulation of (x - z) / s, attention averages (V - z) / s, and the consuming Linear takes
W diag(s) and b + W z. For export, and only with one z per site: a z per timestep group stays in the
activation quantizer, where it is exact for every family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .architectures.family import Family, Site
from .metrics import relative_l2
from .reparam import fold_consumer, fold_modulation, fold_value

PROBES = 16
TOLERANCE = 1e-10  # float64; 16 roundings of the stored dtype where that is coarser


@dataclass(frozen=True)
class Absorbed:
    """A state dict in which the producers carry z and s, and the sites left as they were, with the reason."""

    tensors: dict[str, Tensor]
    refused: dict[str, str]


def absorbing_sites(tensors: Mapping[str, Tensor], family: Family) -> dict[str, Site]:
    """Sites of the model that can give up (z, s), in full names and by their first consumer.

    Consumers that a block lacks (the last text block of SD3 projects nothing) are left out.
    """
    found = {}
    blocks = [split[0] for name in tensors if (split := family.split(name))]
    for block in dict.fromkeys(blocks):
        for site in family.sites:
            consumers = tuple(f"{block}.{name}" for name in site.consumers if f"{block}.{name}.weight" in tensors)
            if not consumers or not (site.modulation or site.values):
                continue
            modulation = site.modulation and (f"{block}.{site.modulation[0]}", *site.modulation[1:])
            values = tuple(f"{block}.{name}" for name in site.values)
            found[consumers[0]] = replace(site, consumers=consumers, modulation=modulation, values=values)
    return found


def absorb(tensors: Mapping[str, Tensor], family: Family, vectors: Mapping[str, tuple[Tensor, Tensor]]) -> Absorbed:
    """vectors: site (a key of `absorbing_sites`) -> its z [K] or [1, K], and s [K] > 0.

    Folds in float64, stores in the dtype of the checkpoint, then compares producer and consumers with the
    original on random inputs; a site that differs is left alone and listed. Raises ValueError for an unknown
    site, for a z per timestep group, for vectors that do not fit, and where a bias to carry z is missing.
    """
    sites = absorbing_sites(tensors, family)
    result, refused = dict(tensors), {}
    for name, (z, s) in vectors.items():
        if name not in sites:
            raise ValueError(f"{name} is not a site whose producer can absorb; this model has {', '.join(sites)}")
        site = sites[name]
        z, s = _checked(name, z, s, tensors[f"{name}.weight"].shape[1])
        folded = _fold(result, site, z, s)
        error = _difference(result, {**result, **folded}, site, z, s)
        coarsest = max(torch.finfo(value.dtype).eps for value in folded.values())
        if error <= max(TOLERANCE, 16 * coarsest):
            result.update(folded)
        else:
            refused[name] = f"absorbed layers differ from the original by {error:.2g}; left as it was"
    return Absorbed(result, refused)


def _checked(name: str, z: Tensor, s: Tensor, features: int) -> tuple[Tensor, Tensor]:
    if z.ndim == 2 and z.shape[0] > 1:
        raise ValueError(
            f"{name}: {z.shape[0]} timestep groups cannot be absorbed, a checkpoint holds one z per site; "
            "quantize with a single group, or leave z to the activation quantizer"
        )
    z, s = z.double().reshape(-1), s.double()
    if z.shape != (features,) or s.shape != (features,):
        raise ValueError(f"{name}: z has {z.numel()} values and s {list(s.shape)}, the input has K={features}")
    if not bool(torch.isfinite(z).all() and torch.isfinite(s).all() and (s > 0).all()):
        raise ValueError(f"{name}: z must be finite, s finite and positive")
    return z, s


def _linear(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    if f"{name}.bias" not in tensors:
        raise ValueError(f"{name} has no bias to carry z; leave this site to the activation quantizer")
    return tensors[f"{name}.weight"].double(), tensors[f"{name}.bias"].double()


def _chunk(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)


def _fold(tensors: Mapping[str, Tensor], site: Site, z: Tensor, s: Tensor) -> dict[str, Tensor]:
    """The entries that change, in the dtypes they had. A Linear may be producer and consumer of different sites."""
    changed: dict[str, tuple[Tensor, Tensor]] = {}
    K = len(z)
    if site.modulation:
        name, shift, scale = site.modulation
        weight, bias = _linear(tensors, name)
        changed[name] = fold_modulation(
            weight, bias, shift_rows=_chunk(shift, K), scale_rows=_chunk(scale, K), z=z, s=s
        )
    for name in site.values:
        changed[name] = fold_value(*_linear(tensors, name), value_rows=_chunk(2, K), z=z, s=s)
    for name in site.consumers:
        changed[name] = fold_consumer(*_linear(tensors, name), z, s)
    parts = {
        f"{name}.{part}": new
        for name, pair in changed.items()
        for part, new in zip(("weight", "bias"), pair, strict=True)
    }
    return {key: new.to(tensors[key].dtype) for key, new in parts.items()}


def _difference(before: Mapping[str, Tensor], after: Mapping[str, Tensor], site: Site, z: Tensor, s: Tensor) -> float:
    """Largest relative difference of any consumer's output when the site runs on random inputs."""
    errors = [
        relative_l2(new, old) for old, new in zip(_run(before, site, len(z)), _run(after, site, len(z)), strict=True)
    ]
    return max(errors)


def _run(tensors: Mapping[str, Tensor], site: Site, features: int) -> list[Tensor]:
    """Producer and consumers of one site on seeded random inputs, in float64: [PROBES, N] per consumer."""
    random = torch.Generator().manual_seed(0)

    def probe(name: str) -> Tensor:
        weight, bias = _linear(tensors, name)
        x = torch.randn(PROBES, weight.shape[1], dtype=torch.float64, generator=random)
        return x.to(weight.device) @ weight.T + bias

    if site.modulation:
        name, shift, scale = site.modulation
        emitted = probe(name)
        normed = torch.randn(PROBES, features, dtype=torch.float64, generator=random).to(emitted.device)
        x = normed * (1 + emitted[:, _chunk(scale, features)]) + emitted[:, _chunk(shift, features)]
    else:
        values = torch.cat([probe(name)[:, _chunk(2, features)] for name in site.values])
        logits = torch.randn(PROBES, len(values), dtype=torch.float64, generator=random)
        x = logits.softmax(dim=-1).to(values.device) @ values
    outputs = []
    for name in site.consumers:
        weight, bias = _linear(tensors, name)
        outputs.append(x @ weight.T + bias)
    return outputs
