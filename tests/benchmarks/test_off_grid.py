"""benchmarks/off_grid.py on an untrained DiT of one block: conditions, starts, and whose errors are measured."""

import copy
from dataclasses import replace

import pytest
import torch
from benchmark_scripts import load
from dit_quant.demo.emoji_dit import DiTConfig, EmojiDiT
from dit_quant.demo.experiment import Prompts, Sampling, draw
from dit_quant.demo.sampler import seeded_noise, shifted_sigmas

FIRST_SEED = 7
off_grid, publish_off_grid = load("off_grid"), load("publish_off_grid")
CONDITIONS = [c for c in off_grid.conditions(Sampling(steps=3)) if c.sampling.steps <= 4]


@pytest.fixture(scope="module")
def model() -> EmojiDiT:
    torch.manual_seed(0)
    return EmojiDiT(DiTConfig(depth=1)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    generator = torch.Generator().manual_seed(1)

    def texts(count):
        return torch.randn(count, 8, 64, generator=generator), torch.randn(count, 64, generator=generator)

    return Prompts(("a", "b"), *texts(2), seeded_noise([FIRST_SEED, FIRST_SEED + 1]), texts(1))


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(2, 16, 16, 16, generator=torch.Generator().manual_seed(2))


def test_conditions_change_one_thing():
    """Heun alone changes two, so that it calls the model as often."""
    base, *others = off_grid.conditions(Sampling())
    assert base == off_grid.Condition(base.name, Sampling())
    for condition in others:
        changed = [
            *(f for f in ("sampler", "denoise", "size") if getattr(condition, f) != getattr(base, f)),
            *(f for f in ("steps", "cfg", "shift") if getattr(condition.sampling, f) != getattr(base.sampling, f)),
        ]
        assert changed == (["sampler", "steps"] if condition.sampler == "heun" else changed[:1]), condition
        assert changed, condition
    assert len({condition.name for condition in [base, *others]}) == len(others) + 1


def test_heun_leaves_the_calibrated_sigmas():
    heun = next(c for c in off_grid.conditions(Sampling()) if c.sampler == "heun")
    calibrated = shifted_sigmas(28, 3.0).tolist()
    assert all(min(abs(a - b) for b in calibrated) > 1e-3 for a in heun.sigmas()[1:-1])


def test_half_denoised_schedule_starts_in_the_middle():
    sigmas = off_grid.Condition("", Sampling(steps=28, shift=3.0), denoise=0.5).sigmas()
    assert len(sigmas) == 29
    assert sigmas[0] == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    assert sigmas[-1] == 0
    assert sigmas[::2] == pytest.approx(shifted_sigmas(28, 3.0).tolist()[14:])


def test_noise_belongs_to_its_seed():
    assert torch.equal(off_grid.noise([3, 4], (16, 16)), seeded_noise([3, 4]))
    wide = off_grid.noise([3, 4], (12, 20))
    assert wide.shape == (2, 16, 12, 20)
    assert torch.equal(off_grid.noise([4], (12, 20))[0], wide[1])
    assert not torch.equal(wide[0], wide[1])


def test_as_calibrated_is_the_calibration_sampler(model, prompts, pictures):
    """Bit by bit: the same noise, sigmas and arithmetic as `draw`."""
    found = off_grid.reference(CONDITIONS[0], model, prompts, pictures, FIRST_SEED)
    assert torch.equal(found.latents, draw(model, prompts, CONDITIONS[0].sampling))


def test_picture_starts_half_noised(model, prompts, pictures):
    condition = next(c for c in CONDITIONS if c.denoise < 1)
    first = off_grid.reference(condition, model, prompts, pictures, FIRST_SEED).trajectory[0]
    assert first.sigma == pytest.approx(0.75)
    torch.testing.assert_close(first.x, 0.25 * pictures + 0.75 * prompts.noise)


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: c.name)
def test_only_the_model_makes_errors(condition, model, prompts, pictures):
    """The same model again has none: starts and fresh noise are shared. Another one has, of both kinds, per prompt."""
    setting = off_grid.reference(condition, model, prompts, pictures, FIRST_SEED)
    assert setting.latents.shape == (2, 16, *condition.size)
    seen = []
    same = off_grid.measure(condition, setting, off_grid.Method(model, seen.append, 32.0))
    assert {name: values.tolist() for name, values in same.items()} == {"velocity": [0, 0], "latent": [0, 0]}
    # the method is told of every level, by the sampler and then by the probes
    probes = len(setting.trajectory)
    assert set(seen[:-probes]) == set(condition.sigmas()[:-1])
    assert seen[-probes:] == [probe.sigma for probe in setting.trajectory]

    other = copy.deepcopy(model)
    other.joint_blocks[0].x_block.mlp.fc2.weight.mul_(1.5)
    worse = off_grid.measure(condition, setting, off_grid.Method(other, None, 8.0))
    assert all((values > 1e-4).all() for values in worse.values())


def test_guidance_is_the_condition_s(model, prompts, pictures):
    """On the trajectory too: velocities judged at another guidance would never be equal."""
    condition = next(c for c in CONDITIONS if c.sampling.cfg == 7)
    setting = off_grid.reference(condition, model, prompts, pictures, FIRST_SEED)
    stale = replace(setting, sampling=Sampling(steps=3))
    assert (off_grid.measure(condition, stale, off_grid.Method(model, None, 32.0))["velocity"] > 1e-4).all()


def test_fresh_noise_is_fresh(model, prompts, monkeypatch):
    """Another one per step and prompt, none of them the start, and of the size of the latents."""

    def spy(velocity, x, sigmas, fresh):
        return torch.cat([x, *(fresh(step) for step in range(3))])

    monkeypatch.setitem(off_grid.SAMPLERS, "spy", spy)
    found = off_grid.draw_in(off_grid.Condition("", Sampling(), sampler="spy"), model, prompts).flatten(1)
    assert len(found) == 8
    # independent: 4096 numbers are correlated by about 1 / 64
    assert (torch.corrcoef(found) - torch.eye(8)).abs().max() < 0.1


def result(errors: dict[str, tuple[float, float]]) -> dict:
    """A results file of two conditions: each method's latent error in them; its velocity error is twice as large."""
    return {
        "versions": {"torch": "1", "comfy-kitchen": "2"},
        "settings": {
            "evaluation_prompts": ["a", "b"],
            "calibrated": {"sampler": "euler", "steps": 28, "cfg": 3.0, "shift": 3.0},
        },
        "rows": [
            {"condition": condition, "method": method, "latent": pair[i], "velocity": 2 * pair[i] ** 2}
            for i, condition in enumerate(("as calibrated", "cfg 7"))
            for method, pair in errors.items()
        ],
    }


def test_table():
    """Every one of ours against a rival of its own."""
    native = {"native int8": (0.5, 0.5), "native int8 + ConvRot": (0.1, 0.1), "native asym_w4a8_int8": (0.2, 0.1)}
    lines = publish_off_grid.table(
        {
            "emoji": result({**native, "W8A8": (0.05, 0.075), "W8A8 static": (0.4, 0.25), "W4A8": (0.16, 0.06)}),
            "emoji_drift": result({**native, "W8A8": (0.02, 0.01)}),
        }
    ).splitlines()
    head = "native int8 | native int8 + ConvRot | W8A8 | W8A8 static | native asym_w4a8_int8 | W4A8"
    assert lines[0] == f"| condition | {head} |"
    expected = "0.5000 | 0.1000 | 0.0750 (0.75x) | 0.2500 (0.50x) | 0.1000 | 0.0600 (0.60x)"
    assert lines[3] == f"| cfg 7 | {expected} |"
    plain = next(line for line in lines if line.startswith("| SD3 layout |"))
    assert plain.split(" | ")[1:3] == ["0.25x to 0.56x", "0.50x to 0.75x"]
    assert plain.split(" | ")[3:5] == ["0.25x to 0.64x", "0.50x to 0.80x"]
    assert "| SD3, outliers that drift | 0.01x to 0.04x | 0.10x to 0.20x | - | - | - | - |" in lines
