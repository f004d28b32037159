"""benchmarks/alternatives.py and its parts: laws of the rejected methods, on an untrained DiT of one block."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from benchmark_scripts import load
from dit_quant.demo.emoji_dit import DiTConfig, EmojiDiT
from dit_quant.demo.experiment import Prompts, Sampling, calibrate, quantized_copy, reference_velocities
from dit_quant.demo.sampler import seeded_noise
from dit_quant.quant_core.linear import QuantLinear, folded_weight
from dit_quant.quant_core.rounding import gptq_int4
from dit_quant.quant_core.schemes import ActivationArgs, Granularity, Partition

alternatives, fake_linear, publish = (load(n) for n in ("alternatives", "fake_linear", "publish_alternatives"))
roundings, scale_search, step_weights, upstream = (
    load(n) for n in ("roundings", "scale_search", "step_weights", "upstream")
)
W4 = alternatives.PRESET
ASYMMETRIC = ActivationArgs(Granularity.PER_TOKEN, symmetric=False)
SAMPLING = Sampling(steps=3, batch=2)


@pytest.fixture(scope="module")
def model() -> EmojiDiT:
    torch.manual_seed(0)
    return EmojiDiT(DiTConfig(depth=1)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    generator = torch.Generator().manual_seed(1)

    def texts(count):
        return torch.randn(count, 8, 64, generator=generator), torch.randn(count, 64, generator=generator)

    return Prompts(("a", "b"), *texts(2), seeded_noise([7, 8]), texts(1))


@pytest.fixture(scope="module")
def bench(model, prompts):
    return alternatives.Bench(model, prompts, SAMPLING, calibrate(model, prompts, SAMPLING)[0])


@pytest.fixture(scope="module")
def fc2(bench):
    """The layer whose input is furthest from white."""
    return bench.layers["joint_blocks.0.x_block.mlp.fc2"]


def correlated(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    """Activations [rows, K] with a mean, and channels that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    return torch.randn(rows, features, generator=generator) @ mixing + 0.5


def hessian_of(x: torch.Tensor, blocks: int = 1) -> torch.Tensor:
    parts = x.double().unflatten(1, (blocks, -1)).transpose(0, 1)
    return parts.transpose(1, 2) @ parts / len(x)


# what runs in place of a QuantLinear


@pytest.mark.parametrize(
    "changes",
    [{}, {"activations": ASYMMETRIC}, {"partition": Partition.LAYER, "interpolate": True}, {"hadamard": 1}],
    ids=["preset", "asymmetric tokens", "groups, interpolated", "no rotation"],
)
def test_fake_layer_of_decoded_weights_is_the_integer_layer(bench, prompts, changes):
    scheme = W4.with_options(**changes)
    twin, state, _ = quantized_copy(bench.model, bench.calibration, scheme)
    layers = {n: m.weight for n, m in twin.named_modules() if isinstance(m, QuantLinear)}
    fake, fake_state = fake_linear.fake_copy(
        bench.model, layers, {name: folded_weight(layer) for name, layer in layers.items()}
    )
    for sigma in (0.9, 0.5, 0.1):
        for which in (state, fake_state):
            which.update(torch.tensor([sigma]))
        for name, layer in layers.items():
            x = correlated(33, layer.features[1]).reshape(3, 11, -1)
            expected = twin.get_submodule(name)(x)
            torch.testing.assert_close(fake.get_submodule(name)(x), expected, rtol=1e-5, atol=1e-5)
            assert isinstance(fake.get_submodule(name), fake_linear.FakeLinear)


def test_unrounded_layers_lead_to_the_preset(bench):
    """Folded weight, Hessian and tables are those that quantize_weight rounds: the same codes come out."""
    twin, _, _ = quantized_copy(bench.model, bench.calibration, W4)
    for name, layer in bench.layers.items():
        expected = twin.get_submodule(name).weight
        # the same codes: steps and multipliers are only multiplied in another order
        found = alternatives.GPTQ(layer.folded(), layer.hessian())
        torch.testing.assert_close(found, folded_weight(expected), rtol=1e-6, atol=0)
        assert layer.like.nbytes == expected.nbytes
        for table in ("smooth", "shift", "correction"):
            ours, theirs = getattr(layer.like, table), getattr(expected, table)
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)


# code tables


def test_lloyd_max_levels_fit_normalized_gaussians_best():
    table = roundings.lloyd_max(16)
    assert (table.diff() > 0).all()
    torch.testing.assert_close(table, -table.flip(0), rtol=0, atol=0.01)
    groups = torch.randn(4096, 16, generator=torch.Generator().manual_seed(5))
    groups = groups / groups.abs().amax(dim=1, keepdim=True)

    def loss(levels):
        return float((roundings.nearest_in_table(groups, levels) - groups).square().mean())

    assert loss(table) < 0.97 * loss(torch.tensor(roundings.NF4))
    assert loss(table) < 0.97 * loss(torch.linspace(-1, 1, 16))


@pytest.mark.parametrize("table", [torch.tensor(roundings.NF4), roundings.lloyd_max(16)], ids=["NF4", "Lloyd-Max"])
def test_nearest_entry_is_nearest_and_stays(table):
    x = torch.linspace(-1.3, 1.3, 1001)
    found = roundings.nearest_in_table(x, table)
    assert torch.equal(found, table[(x[:, None] - table).abs().argmin(dim=1)])
    assert torch.equal(roundings.nearest_in_table(found, table), found)


def on_table(table: torch.Tensor, rows: int = 12, features: int = 64) -> torch.Tensor:
    """Weights that a table holds exactly: each group reaches an end of it, the first one the channel's widest scale."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (rows, features // 16, 16), generator=generator)
    codes[:, :, 3] = 15
    scale = torch.randint(20, roundings.WIDEST, (rows, features // 16, 1), generator=generator)
    sign = torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1
    scale[:, 0] = roundings.WIDEST
    return (table[codes] * scale * sign).flatten(1) / 1000


@pytest.mark.parametrize("blocks", [1, 2])
def test_table_rounding_keeps_what_it_made(blocks):
    """Both signs of the scale, whatever the Hessian; weights off the table do change."""
    table = torch.tensor(roundings.NF4)
    weight, hessian = on_table(table), hessian_of(correlated(500, 64), blocks)
    torch.testing.assert_close(roundings.gptq_table(weight, hessian, 16, table), weight, rtol=1e-5, atol=1e-7)
    off = weight + 0.002
    assert (roundings.gptq_table(off, hessian, 16, table) - off).abs().max() > 1e-4


def test_table_has_sixteen_values_per_group_and_scales_of_eight_bits():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    table = torch.tensor(roundings.NF4)
    rounded = roundings.gptq_table(weight, hessian_of(correlated(500, 64)), 16, table).unflatten(1, (4, 16))
    step = weight.abs().amax(dim=1) / roundings.WIDEST
    for n, row in enumerate(rounded):
        codes = [k * sign for k in range(1, 128) for sign in (1, -1)]
        for group in row:
            fits = [torch.isin((group / (step[n] * k) * 1e4).round(), (table * 1e4).round()).all() for k in codes]
            assert any(fits)


def test_feedback_of_a_table_beats_its_nearest_entries():
    """On correlated inputs; with a diagonal Hessian there is nothing to feed back."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    table, hessian = torch.tensor(roundings.NF4), hessian_of(correlated(1000, 64))
    plain = roundings.gptq_table(weight, torch.eye(64)[None], 16, table)
    loss = roundings.hessian_loss(weight - roundings.gptq_table(weight, hessian, 16, table), hessian)
    assert loss < 0.8 * roundings.hessian_loss(weight - plain, hessian)


# low-rank branch


def test_branch_of_full_rank_restores_the_weight():
    weight, hessian = torch.randn(48, 64, generator=torch.Generator().manual_seed(5)), hessian_of(correlated(500, 64))
    restored = roundings.gptq_with_branch(weight, hessian, 16, rank=48)
    # fp16 factors: 48 products of two numbers, each off by 2^-11
    torch.testing.assert_close(restored, weight, rtol=0, atol=5e-4)
    assert (roundings.gptq_with_branch(weight, hessian, 16, rank=4) - weight).abs().max() > 0.02


@pytest.mark.parametrize("blocks", [1, 2])
def test_branch_is_the_best_of_its_rank_under_the_hessian(blocks):
    """Eckart-Young on E H^(1/2): what is left is the sum of the smaller squared singular values."""
    error, hessian = (
        torch.randn(24, 64, generator=torch.Generator().manual_seed(6)),
        hessian_of(correlated(99, 64), blocks),
    )
    left = roundings.hessian_loss(error - roundings.low_rank_branch(error, hessian, 8), hessian)
    root = torch.linalg.cholesky(torch.block_diag(*hessian) + 1e-9 * torch.eye(64))
    singular = torch.linalg.svdvals(error.double() @ root)
    assert left == pytest.approx(float(singular[8:].square().sum()), rel=1e-3)


def test_branch_size():
    assert roundings.branch_bytes((768, 256), 16) == 16 * 1024 * 2


# coordinate descent


@pytest.mark.parametrize("blocks", [1, 2])
def test_descent_never_raises_the_loss_and_stays_on_the_grid(blocks):
    weight, hessian = (
        torch.randn(32, 64, generator=torch.Generator().manual_seed(7)),
        hessian_of(correlated(200, 64), blocks),
    )
    codes, grid = gptq_int4(weight, hessian, 16, symmetric=False)
    losses = [
        roundings.hessian_loss(weight - roundings.coordinate_descent(weight, codes, grid, hessian, sweeps), hessian)
        for sweeps in range(4)
    ]
    assert losses[0] == pytest.approx(roundings.hessian_loss(weight - grid.decode(codes, 0), hessian))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(losses))
    assert losses[2] < 0.999 * losses[0]
    better = roundings.coordinate_descent(weight, codes, grid, hessian, 2)
    torch.testing.assert_close(grid.decode(grid.encode(better, 0), 0), better)


def test_descent_ends_where_no_single_level_helps():
    weight, hessian = torch.randn(4, 32, generator=torch.Generator().manual_seed(8)), hessian_of(correlated(200, 32))
    codes, grid = gptq_int4(weight, hessian, 16, symmetric=False)
    found = roundings.coordinate_descent(weight, codes, grid, hessian, 50)
    least = roundings.hessian_loss(weight - found, hessian)
    for k in range(32):
        for step in (-1, 1):
            other = found.clone()
            other[0, k] += step * grid.step(k, 1)[0, 0]
            on_grid = torch.allclose(grid.decode(grid.encode(other, 0), 0), other)
            assert not on_grid or roundings.hessian_loss(weight - other, hessian) >= least * (1 - 1e-6)


# upstream-aware targets


def pair_of(plain: torch.Tensor, rounded: torch.Tensor):
    pair = upstream.PairMoments(plain.shape[1])
    for a, b in zip(plain.split(100), rounded.split(100), strict=True):
        pair.add(a, b)
    return pair


def test_target_is_the_weight_where_nothing_changed_upstream():
    x, weight = correlated(500, 48), torch.randn(16, 48, generator=torch.Generator().manual_seed(9))
    pair = pair_of(x, x)
    torch.testing.assert_close(upstream.upstream_target(weight, pair.cross, pair.hessian), weight)


def test_target_undoes_a_linear_change_upstream():
    """x̂ = x̃ A + b: then W' = W A⁻ᵀ, and the rest is in the means."""
    x, weight = correlated(2000, 48), torch.randn(16, 48, generator=torch.Generator().manual_seed(10))
    mixing = torch.eye(48) + 0.2 * torch.randn(48, 48, generator=torch.Generator().manual_seed(11)) / 7
    changed = x @ mixing + 3.0
    pair = pair_of(x, changed)
    target = upstream.upstream_target(weight, pair.cross, pair.hessian, damp=1e-9)
    assert (target - weight).abs().max() > 0.1
    plain, rounded = pair.means
    found = (changed - rounded) @ target.double().T
    torch.testing.assert_close(found, (x - plain) @ weight.double().T, rtol=1e-3, atol=1e-3)


def test_inputs_are_those_of_the_layers_and_the_rest_does_not_run(model):
    generator = torch.Generator().manual_seed(12)
    x, context, pooled = (torch.randn(*s, generator=generator) for s in ((2, 16, 4, 4), (2, 8, 64), (2, 64)))
    late = []
    handle = model.final_layer.register_forward_pre_hook(lambda module, args: late.append(args))
    names = [f"joint_blocks.0.{stream}.attn.qkv" for stream in ("x_block", "context_block")]
    seen = upstream.inputs_of(model, names, lambda: model(x, torch.full((2,), 0.5), context, pooled))
    handle.remove()
    assert {name: tuple(value.shape) for name, value in seen.items()} == dict(
        zip(names, [(2, 4, 64), (2, 8, 64)], strict=True)
    )
    assert late == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_stages_follow_the_data():
    leaves = ("mlp.fc2", "attn.qkv", "mlp.fc1", "attn.proj")
    names = [f"joint_blocks.{b}.{s}.{leaf}" for b in (10, 2) for s in ("x_block", "context_block") for leaf in leaves]
    found = upstream.stages(names)
    assert [{(n.split(".")[1], n.split(".")[-1]) for n in stage} for stage in found] == [
        {(block, leaf)} for block in ("2", "10") for leaf in upstream.STAGES
    ]
    assert all(len(stage) == 2 for stage in found)


def test_without_rounding_nothing_is_made_up_for(bench, prompts):
    """Weights that keep their values: no layer's x̂ differs by more than int8 activations, no target moves far."""
    probes = reference_velocities(bench.model, prompts, SAMPLING, probes=2)
    moved = []

    def keep(target: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        moved.append(target)
        return target

    twin, _ = upstream.round_upstream_aware(bench.model, bench.layers, keep, probes, prompts, SAMPLING.cfg)
    order = [name for stage in upstream.stages(bench.layers) for name in stage]
    for name, target in zip(order, moved, strict=True):
        weight = bench.layers[name].folded()
        assert float((target - weight).norm() / weight.norm()) < 0.02, name
        torch.testing.assert_close(twin.get_submodule(name).values, target)


def test_later_layers_make_up_for_a_shrunken_value(bench, prompts):
    """qkv shrunk by a fifth shrinks what the projection sees (queries and keys are normed): its weight must grow."""
    probes = reference_velocities(bench.model, prompts, SAMPLING, probes=2)
    order = iter(name for stage in upstream.stages(bench.layers) for name in stage)
    targets = {}

    def shrink_qkv(target: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        name = next(order)
        targets[name] = target
        return 0.8 * target if name.endswith("qkv") else target

    upstream.round_upstream_aware(bench.model, bench.layers, shrink_qkv, probes, prompts, SAMPLING.cfg)
    name = "joint_blocks.0.x_block.attn.proj"
    growth = float(targets[name].norm() / bench.layers[name].folded().norm())
    # 1.25 but for the damping of directions that hardly vary
    assert 1.1 < growth < 1.26


def test_first_stage_sees_every_probe_in_its_own_group(bench, prompts):
    """Nothing lies before it: its Hessian is the covariance of the transformed inputs."""
    probes = reference_velocities(bench.model, prompts, SAMPLING, probes=2)
    hessians = []

    def keep(target: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        hessians.append(hessian)
        return target

    twin, state = upstream.round_upstream_aware(bench.model, bench.layers, keep, probes, prompts, SAMPLING.cfg)
    name = upstream.stages(bench.layers)[0][0]
    module, seen = bench.model.get_submodule(name), []
    handle = module.register_forward_pre_hook(
        lambda _, args: seen.append(upstream.transformed(args[0], twin.get_submodule(name)))
    )
    for probe in probes:
        state.update(torch.tensor([probe.sigma]))
        condition = (prompts.context, prompts.pooled)
        upstream.guided_velocity(bench.model, probe.x, probe.sigma, condition, prompts.empty, SAMPLING.cfg)
    handle.remove()
    expected = torch.cat(seen).double().T.cov(correction=0)
    torch.testing.assert_close(hessians[0][0], expected, rtol=1e-4, atol=1e-5)


def test_mean_error_goes_into_the_correction(bench):
    """Whatever the rounder makes of it, the layer's mean output stays that of W x̃."""
    name = "joint_blocks.0.x_block.mlp.fc1"
    layer = bench.layers[name]
    twin, _ = fake_linear.fake_copy(
        bench.model, {n: v.like for n, v in bench.layers.items()}, {n: v.folded() for n, v in bench.layers.items()}
    )
    fake = twin.get_submodule(name)
    plain = correlated(500, 64)
    rounded = plain + 0.1 * correlated(500, 64, seed=1)
    before = layer.like.correction.double()
    upstream.settle(fake, layer, pair_of(plain, rounded), lambda target, hessian: 0.9 * target)
    gained = fake.weight.correction.double() - before
    expected = plain.double().mean(0) @ layer.folded().double().T - rounded.double().mean(0) @ fake.values.double().T
    assert float(expected.norm()) > 0.1
    torch.testing.assert_close(gained, expected.expand_as(gained), rtol=0, atol=5e-3)


# weighted steps


def test_step_lengths_follow_the_schedule():
    lengths = step_weights.step_lengths(Sampling(steps=28, shift=1.0), 1)
    torch.testing.assert_close(lengths, torch.ones(28, dtype=torch.float64), rtol=1e-4, atol=0)
    once, twice = (step_weights.step_lengths(Sampling(steps=28, shift=3.0), power) for power in (1, 2))
    assert (once.diff() > 0).all()
    torch.testing.assert_close(once**2 / (once**2).mean(), twice)


def test_equal_weights_give_the_plain_hessian(bench):
    equal = torch.full((1, 3), 0.7, dtype=torch.float64)
    moments = step_weights.weighted_moments(bench.model, bench.prompts, SAMPLING, bench.layers, equal, 1024)
    for name, layer in bench.layers.items():
        weighted = step_weights.weighted_statistics(layer.statistics, moments[name][0], equal[0])
        expected = layer.hessian()
        found = replace(layer, statistics=weighted).hessian()
        # fp32 sums in another order, then a mean is taken off
        assert float((found - expected).norm() / expected.norm()) < 1e-5, name


def test_unequal_weights_weigh_the_transformed_inputs(bench):
    """The Hessian is the weighted mean of x̃ x̃ᵀ over the steps, each shifted by the mean of its own group."""
    weights = torch.tensor([1.0, 0.25, 3.0], dtype=torch.float64)
    moments = step_weights.weighted_moments(bench.model, bench.prompts, SAMPLING, bench.layers, weights[None], 1024)
    name = "joint_blocks.0.x_block.mlp.fc1"
    twin, state, _ = quantized_copy(bench.model, bench.calibration, W4)
    seen = []

    def hook(module, args):
        seen.append(upstream.transformed(args[0], twin.get_submodule(name)).double())

    handle = bench.model.get_submodule(name).register_forward_pre_hook(hook)
    alternatives.draw(bench.model, bench.prompts, SAMPLING, before_step=alternatives.update_with(state))
    handle.remove()
    expected = sum(w * x.T @ x / len(x) for w, x in zip(weights, seen, strict=True)) / weights.sum()
    layer = bench.layers[name]
    assert len(layer.rows) > 1
    found = replace(
        layer, statistics=step_weights.weighted_statistics(layer.statistics, moments[name][0], weights)
    ).hessian()[0]
    assert float((found - expected).norm() / expected.norm()) < 1e-3
    assert float((layer.hessian()[0] - expected).norm() / expected.norm()) > 1e-2


# scales


def test_search_takes_the_least_loss_of_each_criterion(bench, fc2):
    gptq, sigmas = alternatives.GPTQ, bench.calibration.sigmas
    best = scale_search.search_strength(fc2, sigmas, gptq)
    tried = {s: scale_search.search_strength(fc2, sigmas, gptq, (s,)) for s in scale_search.STRENGTHS}

    def loss(criterion, like, values):
        layer = replace(fc2, like=like)
        if criterion == "output error":
            return scale_search.output_error(layer, values, sigmas)
        return roundings.hessian_loss(layer.folded() - values, layer.hessian())

    for criterion in scale_search.CRITERIA:
        losses = [loss(criterion, *found[criterion]) for found in tried.values()]
        assert len(set(losses)) == len(losses)
        assert loss(criterion, *best[criterion]) == min(losses)


def test_fixed_strength_of_a_half_is_the_preset(fc2, bench):
    found = scale_search.search_strength(fc2, bench.calibration.sigmas, alternatives.GPTQ, (0.5,))
    assert torch.equal(found["Hessian loss"][0].smooth, fc2.like.smooth)


def test_output_error_is_that_of_the_int8_activations_for_exact_weights(bench, fc2):
    exact = scale_search.output_error(fc2, fc2.folded(), bench.calibration.sigmas)
    power = float((fc2.statistics.rows.float() @ fc2.weight.T).square().sum())
    assert 0 < exact < 1e-3 * power
    rounded = alternatives.GPTQ(fc2.folded(), fc2.hessian())
    assert scale_search.output_error(fc2, rounded, bench.calibration.sigmas) > 3 * exact


def test_output_error_is_that_of_the_integer_layer(bench):
    """On the same rows, each in its own timestep group."""
    name = "joint_blocks.0.x_block.mlp.fc1"
    layer, sigmas = bench.layers[name], bench.calibration.sigmas
    twin, state, _ = quantized_copy(bench.model, bench.calibration, W4)
    module, plain = twin.get_submodule(name), bench.model.get_submodule(name)
    expected = 0.0
    for t, sigma in enumerate(sigmas):
        state.update(torch.tensor([sigma]))
        x = layer.statistics.rows[layer.statistics.row_bin == t].float()
        expected += float((module(x) - plain(x)).square().sum())
    found = scale_search.output_error(layer, folded_weight(module.weight), sigmas)
    assert found == pytest.approx(expected, rel=1e-4)


def test_scale_by_maxima_is_smoothquant_s(fc2):
    """Up to a common factor, and half of it in the exponent at half strength."""
    seen, weight = fc2.statistics, fc2.weight
    shift = torch.zeros_like(seen.minimum)
    for g, steps in enumerate(fc2.rows):
        shift[steps] = fc2.like.shift[g].float()
    reach = torch.maximum((seen.maximum - shift).abs(), (seen.minimum - shift).abs()).amax(dim=0)
    expected = (reach / weight.abs().amax(dim=0)).sqrt()
    found = scale_search.by_maxima(fc2, 1.0).like.smooth.float()
    torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=2e-3, atol=0)
    half = scale_search.by_maxima(fc2, 0.5).like.smooth.float()
    torch.testing.assert_close(half / half[0], (found / found[0]).sqrt(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_scaled_layer_keeps_its_function(fc2, strength):
    """Unrounded: x/s times W diag(s)."""
    layer = scale_search.by_maxima(fc2, strength)
    x = correlated(20, layer.weight.shape[1])
    moved = upstream.transform(x, None, layer.like.smooth, torch.tensor([0]), torch.tensor([0.0]), layer.like.hadamard)
    torch.testing.assert_close(moved @ layer.folded().T, x @ layer.weight.T, rtol=1e-3, atol=1e-4)


# the script


@pytest.mark.parametrize("name", list(alternatives.methods()))
def test_every_method_rounds_every_layer_and_is_a_little_off(bench, name):
    rounded = alternatives.methods()[name].build(bench)
    layers = [m for m in rounded.model.modules() if isinstance(m, QuantLinear)]
    assert len(layers) == len(bench.layers)
    setting = alternatives.Setting(
        bench.prompts, SAMPLING, torch.zeros(0), reference_velocities(bench.model, bench.prompts, SAMPLING, probes=2)
    )
    found = alternatives.measure(rounded.model, alternatives.update_with(rounded.state), setting, pictures=False)
    assert (found["velocity"] > 1e-4).all()
    assert (found["velocity"] < 0.3).all()
    assert 4 < rounded.bits_per_weight < 12


def test_sizes_are_counted(bench):
    """A branch costs its factors; every other rounding of the same grid costs nothing."""
    base = alternatives.methods()[alternatives.BASELINE].build(bench).bits_per_weight
    assert alternatives.methods()["16 levels of NF4"].build(bench).bits_per_weight == pytest.approx(base)
    branch = sum(2 * 16 * sum(layer.like.features) for layer in bench.layers.values())
    weights = sum(math.prod(layer.like.features) for layer in bench.layers.values())
    found = alternatives.with_branch(bench).bits_per_weight
    assert found == pytest.approx(base + 8 * branch / weights)


def test_rotation_is_left_out_where_modulation_feeds(bench):
    rounded = alternatives.rotated_where_unmodulated(bench).model
    orders = {name: rounded.get_submodule(name).weight.hadamard for name in bench.layers}
    assert {name for name, order in orders.items() if order == 1} == {
        name for name in bench.layers if name.endswith(("qkv", "fc1"))
    }
    assert set(orders.values()) == {1, 64, 256}


def test_thinned_prompts_are_spread_and_keep_their_own_noise():
    context, pooled, noise = torch.rand(6, 2, 3), torch.rand(6, 3), torch.rand(6, 1, 2, 2)
    prompts = Prompts(tuple("abcdef"), context, pooled, noise, (context[:1], pooled[:1]))
    some = upstream.thinned(prompts, 3)
    assert some.names == ("a", "c", "e")
    for name in ("context", "pooled", "noise"):
        assert torch.equal(getattr(some, name), getattr(prompts, name)[::2])
    assert upstream.thinned(prompts, 9).names == prompts.names


def test_row_is_paired_with_the_baseline():
    base = {"velocity": np.array([0.1, 0.3]), "latent": np.array([0.1, 0.1])}
    found = {"velocity": base["velocity"] / 2, "latent": base["latent"] * 2}
    method = partial(alternatives.Method, build=lambda bench: None)
    row = alternatives.row("x", method(latents=True), 4.71234, found, base)
    assert row["velocity_ratio"] == pytest.approx([0.5, 0.5, 0.5])
    assert row["latent_ratio"] == pytest.approx([2, 2, 2])
    assert (row["method"], row["reference"], row["bits_per_weight"]) == ("x", False, 4.712)
    assert "latent" not in alternatives.row("x", method(), 4.7, found, base)


# its table


def result() -> dict:
    def row(name, ratio, **more):
        return {
            "method": name,
            "reference": False,
            "bits_per_weight": 4.71,
            "velocity": 0.05,
            "velocity_ratio": ratio,
            **more,
        }

    return {
        "versions": {"torch": "1"},
        "settings": {"evaluation_prompts": ["a", "b"], "calibration_prompts": 96, "steps": 28, "baseline": "W4A8"},
        "rows": [
            row("W4A8", [1, 1, 1], reference=True),
            row("tables", [1.034, 1.01, 1.06]),
            row("weights", [0.99, 0.97, 1.02], latent=0.02, latent_ratio=[1.2, 1.1, 1.3]),
            row("groups of 8", [0.8, 0.79, 0.81], reference=True),
        ],
    }


def test_published_table():
    lines = publish.table(result()).splitlines()
    assert "| W4A8 | 4.71 | 0.0500 | - |" in lines
    assert "| tables | 4.71 | 0.0500 | 1.03x (1.01 to 1.06) |" in lines
    assert "| weights | 4.71 | 0.0500 | 0.99x (0.97 to 1.02); latent 1.20x (1.10 to 1.30) |" in lines
    assert "| *groups of 8* | 4.71 | 0.0500 | 0.80x (0.79 to 0.81) |" in lines


def test_the_page_has_a_place_for_the_table():
    pages = load("pages")
    page = (pages.ROOT / "docs" / "quality.md").read_text()
    assert "| tables |" in pages.insert(page, "alternatives table", publish.table(result()))
