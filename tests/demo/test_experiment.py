"""The shared steps on a small random model: splits, calibration, copies, errors."""

import pytest
import torch
from dit_quant.demo.experiment import (
    Sampling,
    calibrate,
    draw,
    every_linear,
    prepare,
    quantizable,
    quantized_copy,
    reference_velocities,
    split_prompts,
    timed_draw,
    update_with,
    velocity_error,
)
from dit_quant.demo.prompts import PromptTable
from dit_quant.demo.sampler import shifted_sigmas
from dit_quant.quant_core.convert import CannotQuantize
from dit_quant.quant_core.linear import QuantLinear
from dit_quant.quant_core.schemes import PRESETS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

SAMPLING = Sampling(steps=3, batch=2)


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_splits_never_meet(trained, data):
    table = PromptTable(torch.zeros(1, 2), torch.zeros(8, 1), {}, tuple(f"p{i}" for i in range(trained)))
    calibration = data.draw(st.integers(0, (trained + 1) // 2))
    evaluation = data.draw(st.integers(0, trained // 2))
    one, two = split_prompts(table, calibration, evaluation)
    assert (len(one), len(two)) == (calibration, evaluation)
    assert len({*one, *two}) == calibration + evaluation


def test_too_many_prompts_are_refused(table):
    with pytest.raises(ValueError, match=r"6 calibration prompts .* has 5"):
        split_prompts(table, 6, 1)
    with pytest.raises(ValueError, match=r"6 evaluation prompts .* has 5"):
        split_prompts(table, 5, 6)


def test_a_prompt_listed_twice_is_on_one_side():
    table = PromptTable(torch.zeros(1, 2), torch.zeros(8, 1), {}, ("cat", "cat", "dog"))
    assert split_prompts(table, 1, 1) == (["cat"], ["dog"])


def test_noise_is_bound_to_the_prompt_not_the_batch(table):
    three, two = prepare(table, ["cat", "dog", "sun"], 40), prepare(table, ["cat", "dog"], 40)
    assert torch.equal(three.noise[:2], two.noise)
    assert three.names == ("cat", "dog", "sun")


def test_batches_change_nothing(tiny, table):
    prompts = prepare(table, ["cat", "dog", "sun"], 0)
    whole = draw(tiny, prompts, Sampling(steps=2, batch=8))
    torch.testing.assert_close(draw(tiny, prompts, Sampling(steps=2, batch=1)), whole, rtol=1e-4, atol=1e-4)


def test_timing_changes_nothing(tiny, table):
    prompts, seen = prepare(table, ["cat", "dog", "sun"], 0), []
    latents, seconds = timed_draw(tiny, prompts, SAMPLING, seen.append)
    assert torch.equal(latents, draw(tiny, prompts, SAMPLING))
    assert 0 < seconds < 60
    assert seen == shifted_sigmas(3, SAMPLING.shift).tolist()[:-1] * 2


def test_only_block_layers_are_rounded(tiny):
    found, kept = quantizable(tiny)
    assert set(found) | set(kept) == set(every_linear(tiny))
    assert not set(found) & set(kept)
    assert set(found) == {
        f"joint_blocks.{block}.{side}.{layer}"
        for block in range(2)
        for side in ("context_block", "x_block")
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        if (block, side) != (1, "context_block") or layer == "attn.qkv"
    }
    assert all(kept.values())


def test_unknown_model_is_refused():
    with pytest.raises(CannotQuantize, match="Sequential belongs to no known DiT family"):
        quantizable(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("name", PRESETS)
def test_quantized_copy(tiny, table, name):
    """The copy is close, really quantized, and the original is untouched."""
    calibration, latents = calibrate(tiny, prepare(table, ["red apple", "cat", "dog face"], 0), SAMPLING)
    assert len(calibration.sigmas) == SAMPLING.steps
    assert calibration.curvature is not None
    assert calibration.curvature.keys() == calibration.layers.keys()
    assert torch.equal(latents, draw(tiny, prepare(table, ["red apple", "cat", "dog face"], 0), SAMPLING))
    before = {key: value.clone() for key, value in tiny.state_dict().items()}

    twin, state, report = quantized_copy(tiny, calibration, PRESETS[name])
    assert report.scheme == name
    assert len(report.layers) == sum(isinstance(module, QuantLinear) for module in twin.modules()) == 13
    assert {layer.name for layer in report.skipped} == set(quantizable(tiny)[1])

    prompts = prepare(table, ["green apple", "sun"], 100)
    reference = reference_velocities(tiny, prompts, SAMPLING, probes=2)
    error = velocity_error(twin, state, prompts, SAMPLING, reference)
    assert 1e-5 < error < 0.25
    assert draw(twin, prompts, SAMPLING, update_with(state)).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in tiny.state_dict().items())


def test_groups_follow_sigma(tiny, table):
    """The state that a copy samples with really changes its group between the first and the last step."""
    sampling = Sampling(steps=12)
    calibration, _ = calibrate(tiny, prepare(table, ["red apple", "cat"], 0), sampling)
    twin, state, _ = quantized_copy(tiny, calibration, PRESETS["W8A8"])
    select, groups, seen = update_with(state), state.partitions[0], []

    def before(sigma):
        select(sigma)
        seen.append(int(state.index[0]))

    draw(twin, prepare(table, ["sun"], 5), sampling, before)
    assert seen == [groups.index(sigma) for sigma in shifted_sigmas(12, sampling.shift).tolist()[:-1]]
    assert seen[0] == 0
    assert seen[-1] == len(groups) - 1 > 0


def test_full_precision_has_no_error(tiny, table):
    """Its own trajectory is where the probes are taken: first and last step included."""
    prompts = prepare(table, ["cat", "dog"], 0)
    reference = reference_velocities(tiny, prompts, Sampling(steps=5), probes=3)
    sigmas = shifted_sigmas(5, 3.0).tolist()
    assert [probe.sigma for probe in reference] == [sigmas[0], sigmas[2], sigmas[4]]
    assert torch.equal(reference[0].x, prompts.noise)
    assert velocity_error(tiny, None, prompts, Sampling(steps=5), reference) == 0
    last = reference[-1].x + (0 - sigmas[4]) * reference[-1].velocity
    torch.testing.assert_close(last, draw(tiny, prompts, Sampling(steps=5)), rtol=1e-5, atol=1e-5)


def test_one_probe_is_refused(tiny, table):
    with pytest.raises(ValueError, match="1 probes"):
        reference_velocities(tiny, prepare(table, ["cat"], 0), SAMPLING, probes=1)
