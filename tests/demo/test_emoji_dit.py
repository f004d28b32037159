"""The readable DiT: shapes, names, tables; each against a formula written another way."""

import math

import numpy as np
import pytest
import torch
from dit_quant.demo.emoji_dit import (
    DiTConfig,
    EmojiDiT,
    config_of,
    load_emoji_dit,
    position_embedding,
    timestep_embedding,
)
from safetensors.torch import save_file


def inputs(batch, rows, cols, channels=16, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, channels, rows, cols, generator=generator),
        torch.rand(batch, generator=generator),
        torch.randn(batch, 8, 64, generator=generator),
        torch.randn(batch, 64, generator=generator),
    )


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("batch", "rows", "cols"), [(1, 2, 2), (3, 16, 16), (2, 4, 10)])
def test_velocity_has_the_shape_of_the_latent(tiny, batch, rows, cols):
    x, sigma, context, pooled = inputs(batch, rows, cols)
    assert tiny(x, sigma, context, pooled).shape == x.shape


def test_samples_of_a_batch_do_not_meet(tiny):
    x, sigma, context, pooled = inputs(3, 8, 8)
    together = tiny(x, sigma, context, pooled)
    alone = torch.cat([tiny(x[i : i + 1], sigma[i : i + 1], context[i : i + 1], pooled[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("part", range(4), ids=["latent", "sigma", "context", "pooled"])
def test_every_input_matters(tiny, part):
    one, two = inputs(1, 8, 8), list(inputs(1, 8, 8))
    two[part] = inputs(1, 8, 8, seed=4)[part]
    assert not torch.allclose(tiny(*one), tiny(*two), atol=1e-4)


def test_text_order_is_no_input(tiny):
    """Text tokens carry their place in the embedding only: attention itself sees a set."""
    x, sigma, context, pooled = inputs(1, 8, 8)
    shuffled = context[:, torch.randperm(8, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(tiny(x, sigma, context, pooled), tiny(x, sigma, shuffled, pooled), rtol=1e-4, atol=1e-5)


def test_patches_return_to_their_places(tiny):
    """A final layer that only has a bias paints the same 2x2 patch of 16 channels everywhere, channels innermost."""
    torch.nn.init.zeros_(tiny.final_layer.linear.weight)
    tiny.final_layer.linear.bias.copy_(torch.arange(64.0))
    out = tiny(*inputs(1, 4, 6))
    for row in range(4):
        for col in range(6):
            expected = torch.arange(16.0) + 16 * (2 * (row % 2) + col % 2)
            assert torch.equal(out[0, :, row, col], expected)


def test_names_are_those_of_the_host():
    """Spelled out, so that a rename of any module shows."""
    stream = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"}
    last = {"attn.qkv", "adaLN_modulation.1"}
    outside = {
        *("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.mlp.0", "y_embedder.mlp.2"),
        *("context_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"),
    }
    affine = set(outside)
    norms = set()
    for block in range(3):
        for side, modules in (("context_block", last if block == 2 else stream), ("x_block", stream)):
            prefix = f"joint_blocks.{block}.{side}"
            affine |= {f"{prefix}.{name}" for name in modules}
            norms |= {f"{prefix}.attn.ln_q.weight", f"{prefix}.attn.ln_k.weight"}
    expected = norms | {f"{name}.{kind}" for name in affine for kind in ("weight", "bias")}
    assert set(EmojiDiT(DiTConfig(depth=3)).state_dict()) == expected


@pytest.mark.parametrize(
    "config",
    [DiTConfig(), DiTConfig(depth=1), DiTConfig(2, latent_channels=4, patch=4, context_dim=24, pooled_dim=40)],
    ids=["bundled", "one block", "odd"],
)
def test_config_is_read_off_the_tensors(config):
    assert config_of(shapes_of(EmojiDiT(config))) == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_round_trip(tiny, tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in tiny.state_dict().items()}, path)
    loaded = load_emoji_dit(path, dtype)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert value.dtype is dtype
        assert torch.equal(value.float(), tiny.state_dict()[name].bfloat16().float()), name
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_truncated_checkpoint_is_not_loaded(tiny, tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {name: value.clone() for name, value in tiny.state_dict().items()}
    del tensors["joint_blocks.1.x_block.mlp.fc2.bias"]
    save_file(tensors, path)
    with pytest.raises(RuntimeError, match=r"joint_blocks\.1\.x_block\.mlp\.fc2\.bias"):
        load_emoji_dit(path)


def reference_position(y, x, dim):
    """One row of the table, scalar by scalar, in float64."""
    quarter = dim // 4
    omega = [1 / 10000 ** (i / quarter) for i in range(quarter)]
    return np.array([f(p * o) for p, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)) for o in omega])


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 8), (5, 3), (2, 9)])
def test_position_embedding_against_scalars(height, width):
    dim, short = 64, min(height, width)
    table = position_embedding(height, width, dim).double().numpy()
    assert table.shape == (height * width, dim)
    for i in range(height):
        for j in range(width):
            # a square of side 15 over the shorter axis, the longer one overhanging evenly
            y = 7.5 + (2 * i / (height - 1) - 1) * 7.5 * height / short
            x = 7.5 + (2 * j / (width - 1) - 1) * 7.5 * width / short
            assert np.abs(table[i * width + j] - reference_position(y, x, dim)).max() < 2e-5


def test_timestep_embedding_against_scalars():
    t = torch.tensor([0.0, 0.5, 250.0, 1000.0])
    table = timestep_embedding(t).double().numpy()
    omega = np.exp(-math.log(10000) * np.arange(128) / 128)
    angle = t.double().numpy()[:, None] * omega
    # fp32 angles up to 1000 carry an error of 6e-5
    assert np.abs(table - np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).max() < 2e-4


def test_bundled_model(assets):
    path = assets / "emoji_dit.safetensors"
    assert path.stat().st_size <= 20e6
    model = load_emoji_dit(path)
    assert model.config == DiTConfig(depth=4, latent_channels=16, patch=2, context_dim=64, pooled_dim=64)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
