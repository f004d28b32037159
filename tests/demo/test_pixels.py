"""Pictures to latents and back."""

import pytest
import torch
from dit_quant.demo.pixels import to_latent, to_rgb


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 32, 32), (3, 2, 2), (2, 6, 10)])
def test_round_trip(batch, height, width):
    rgba = torch.rand(batch, 4, height, width)
    latent = to_latent(rgba)
    assert latent.shape == (batch, 16, height // 2, width // 2)
    torch.testing.assert_close(to_rgb(latent), rgba[:, :3], rtol=0, atol=1e-6)


def test_latents_are_centred():
    assert (to_latent(torch.zeros(1, 4, 2, 2)) == -1).all()
    assert (to_latent(torch.ones(1, 4, 2, 2)) == 1).all()


def test_each_colour_keeps_its_four_channels():
    """Channel 4 c + 2 dy + dx of a latent pixel is colour c at (2 y + dy, 2 x + dx)."""
    rgba = torch.rand(1, 4, 6, 8)
    latent = to_latent(rgba)
    for c in range(4):
        for dy in range(2):
            for dx in range(2):
                assert torch.equal(latent[:, 4 * c + 2 * dy + dx], rgba[:, c, dy::2, dx::2] * 2 - 1)


def test_pictures_stay_in_range():
    rgb = to_rgb(torch.randn(2, 16, 16, 16, dtype=torch.bfloat16) * 3)
    assert rgb.dtype is torch.float32
    assert rgb.min() == 0
    assert rgb.max() == 1
