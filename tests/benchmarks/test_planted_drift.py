"""Planted mean drift on an untrained DiT: the function stays, the mean moves, and one shift does not hold it."""

import pytest
import torch
from benchmark_scripts import load
from dit_quant.demo.emoji_dit import DiTConfig, EmojiDiT
from dit_quant.demo.experiment import Prompts, Sampling, calibrate
from dit_quant.quant_core.covariance import rounding_hessian

drift, planted = load("planted_drift"), load("planted")
SAMPLING = Sampling(steps=8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return EmojiDiT(DiTConfig(depth=2)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    context, pooled = torch.randn(17, 8, 64, generator=generator), torch.randn(17, 64, generator=generator)
    noise = torch.randn(16, 16, 16, 16, generator=generator)
    return Prompts(tuple("abcdefghijklmnop"), context[:16], pooled[:16], noise, (context[16:], pooled[16:]))


@pytest.fixture(scope="module")
def calibration(model, prompts):
    return calibrate(model, prompts, SAMPLING)[0]


@pytest.fixture(scope="module")
def pair(model, prompts, calibration):
    return drift.mean_drift(model, calibration.layers, torch.cat([prompts.pooled, prompts.empty[1]]))


@pytest.fixture(scope="module")
def chosen(model, calibration):
    return drift.directions(model, calibration.layers)


def test_every_modulated_input_of_both_streams_drifts(chosen, model):
    assert {name.split(".", 3)[3] for name in chosen} == {"attn.qkv", "mlp.fc1"}
    assert len(chosen) == 4 + 3  # the last text block has no feed-forward
    for a in chosen.values():
        assert int((a != 0).sum()) == 12


def test_the_drift_leaves_the_function_as_it_was(pair):
    blind, drifting = pair
    assert planted.function_difference(blind, drifting) < 1e-5


def test_without_the_projection_the_drift_is_seen(model, chosen, prompts):
    """Negative control: the same adaLN rows in front of the original weights."""
    drifting = drift.drifting_mean(model, chosen, prompts.pooled)
    assert planted.function_difference(model, drifting) > 0.1


def test_consumers_are_blind_to_the_direction_and_no_column_is_small(model, pair, chosen):
    before, after = model.state_dict(), pair[1].state_dict()
    for name, a in chosen.items():
        old, new = before[f"{name}.weight"].double(), after[f"{name}.weight"].double()
        # fp32 storage of the products
        assert (new @ a).norm() < 1e-6 * new.norm() * a.norm()
        assert (old @ a).norm() > 1e-2 * old.norm() * a.norm() / len(a) ** 0.5
        hit = a != 0
        assert (new[:, hit].norm(dim=0) > 0.5 * old[:, hit].norm(dim=0)).all()


def test_the_projection_loses_less_than_one_along_the_direction_alone(model, calibration, chosen):
    """v = C^-1 a / (a C^-1 a) against v = a / |a|^2, by the power of v (x - mean)."""
    for name, a in chosen.items():
        seen = calibration.layers[name]
        steps = [list(range(len(seen.count)))]
        mean = (seen.count / seen.count.sum()) @ seen.mean.double()
        C = rounding_hessian(seen, steps, mean[None], None, 1)[0]
        v = torch.linalg.solve(drift.with_ridge(C), a)
        v = v / (a @ v)
        alone = a / a.square().sum()
        assert v @ C @ v < 0.5 * alone @ C @ alone


def test_the_mean_moves_far_and_one_shift_leaves_most_of_it(pair, prompts, chosen):
    calibration, _ = calibrate(pair[1], prompts, SAMPLING)
    for name, a in chosen.items():
        seen, hit = calibration.layers[name], a != 0
        within = drift.within(seen)[hit]
        mean = seen.mean[:, hit].double()
        rest = (mean - mean.mean(dim=0)).square().mean(dim=0).sqrt()
        assert ((mean.amax(dim=0) - mean.amin(dim=0)) / within).median() > 10
        assert (rest / within).median() > 4
        others = seen.mean[:, ~hit].double()
        untouched = (others - others.mean(dim=0)).square().mean(dim=0).sqrt() / drift.within(seen)[~hit]
        assert (rest / within).median() > 10 * untouched.median()


def test_the_read_out_follows_sigma_for_every_prompt(model, prompts):
    u, constant = drift.sigma_readout(model, prompts.pooled)
    seen = []
    layer = model.joint_blocks[0].x_block.adaLN_modulation[1]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].double() @ u + constant))
    for sigma in (1.0, 0.7, 0.3, 0.05):
        model(prompts.noise, torch.full((16,), sigma), prompts.context, prompts.pooled)
    handle.remove()
    f = torch.stack(seen)  # [sigmas, prompts]
    assert (f.diff(dim=0) < -0.2).all()
    # a random embedder of width 128 bends the line
    assert (f - torch.tensor([[1.0], [0.4], [-0.4], [-0.9]])).abs().max() < 0.5
    assert f.std(dim=1).max() < 0.1


def test_the_base_model_is_not_modified(model, calibration, prompts):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drift.mean_drift(model, calibration.layers, prompts.pooled)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_calibration_without_whole_covariances_is_refused(model, prompts):
    narrow, _ = calibrate(model, prompts, Sampling(steps=2), covariance=64)
    with pytest.raises(ValueError, match="whole covariance"):
        drift.directions(model, narrow.layers)
