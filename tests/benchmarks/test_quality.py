"""The measuring parts of benchmarks/quality.py, and that planted models are the same function."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_quant.demo.emoji_dit import EmojiDiT

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str):
    """A script of benchmarks/ as a module; its folder is only on the path while it loads."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        # dataclasses look their module up
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def quality():
    return load("quality")


@pytest.fixture(scope="module")
def planted():
    return load("planted")


@pytest.fixture
def model() -> EmojiDiT:
    torch.manual_seed(0)
    return EmojiDiT().eval().requires_grad_(False)


def test_ssim_is_one_for_equal_pictures_and_less_for_others(quality):
    a = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(quality.ssim(a, a), torch.ones(3))
    little, much = quality.ssim(a, (a + 0.02).clamp(0, 1)), quality.ssim(a, a.flip(3))
    assert (little < 1).all()
    assert (much < little).all()


def test_relative_rows_judges_every_prompt_by_itself(quality):
    reference = torch.ones(2, 4)
    value = torch.stack([torch.ones(4), torch.full((4,), 1.5)])
    assert quality.relative_rows(value, reference).tolist() == [0.0, 0.5]


def test_interval_is_paired(quality):
    """Half of a wildly varying baseline is half of it in every resample."""
    baseline = np.random.default_rng(0).lognormal(size=40)
    assert quality.ratio_interval(baseline / 2, baseline) == pytest.approx([0.5, 0.5, 0.5])
    mean, low, high = quality.ratio_interval(np.random.default_rng(1).lognormal(size=40), baseline)
    assert low < mean < high


def test_planted_outliers_keep_the_function(planted, model):
    twin = planted.plant(model, planted.mean_and_variance(model))
    # fp32 with gains of 50 and offsets of 40: a few hundred roundings of 6e-8
    assert planted.function_difference(model, twin) < 1e-5
    qkv = "joint_blocks.0.x_block.attn.qkv.weight"
    assert not torch.equal(model.state_dict()[qkv], twin.state_dict()[qkv])


def test_difference_is_seen(planted, model):
    twin = planted.plant(model, planted.mean_and_variance(model))
    twin.joint_blocks[0].x_block.attn.qkv.bias.add_(1.0)
    assert planted.function_difference(model, twin) > 1e-3
