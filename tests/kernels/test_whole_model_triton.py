"""A whole quantized DiT on the Triton kernels: its layers, its groups' tables, its steps, as on a card."""

import pytest
import torch
from dit_quant.demo.emoji_dit import DiTConfig, EmojiDiT
from dit_quant.demo.experiment import Prompts, Sampling, calibrate, quantized_copy
from dit_quant.kernels import dispatch
from dit_quant.quant_core.linear import QuantLinear
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.schemes import PRESETS

pytest.importorskip("triton")

SIGMAS = (0.9, 0.2)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    empty = random(1, 5, 64, seed=3), random(1, 64, seed=4)
    return Prompts(("a", "b"), random(2, 5, 64, seed=1), random(2, 64, seed=2), random(2, 16, 8, 8), empty)


@pytest.fixture(scope="module")
def model() -> EmojiDiT:
    """One block, random: the interpreter takes seconds for every layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EmojiDiT(DiTConfig(depth=1)).requires_grad_(False)


@pytest.fixture(scope="module")
def calibration(model, prompts):
    return calibrate(model, prompts, Sampling(steps=4, batch=2))[0]


def velocities(model, state, prompts, device, monkeypatch, backend: str) -> list[torch.Tensor]:
    """At every sigma."""
    monkeypatch.setenv(dispatch.ENVIRONMENT, backend)
    dispatch.reset()
    given = [value.to(device) for value in (prompts.noise, prompts.context, prompts.pooled)]
    found = []
    with torch.inference_mode():
        for sigma in SIGMAS:
            state.update(torch.tensor([sigma], device=device))
            x, context, pooled = given
            found.append(model(x, torch.full((len(x),), sigma, device=device), context, pooled).cpu())
    assert {choice.backend for choice in dispatch.recorded().values()} == {backend}
    dispatch.reset()
    return found


@pytest.mark.parametrize("preset", ["W8A8", "W8A8 fast", "W8A8 static", "W4A8"])
def test_a_model_runs_as_its_definition(preset, model, prompts, calibration, device, monkeypatch):
    twin, state, _ = quantized_copy(model, calibration, PRESETS[preset])
    twin.to(device)
    for module in twin.modules():
        # whose tensors are no parameters
        if isinstance(module, QuantLinear):
            module.weight = module.weight.map(lambda tensor: tensor.to(device))
            module.bias = None if module.bias is None else module.bias.to(device)
    found, expected = (velocities(twin, state, prompts, device, monkeypatch, b) for b in ("triton", "reference"))
    if preset == "W8A8":
        # coordinates are sums in another order: one that rounds the other way changes all codes of its token
        for sigma, a, b in zip(SIGMAS, found, expected, strict=True):
            exact = model(prompts.noise, torch.full((2,), sigma), prompts.context, prompts.pooled)
            assert relative_l2(a, exact) < 1.5 * relative_l2(b, exact)
    else:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
