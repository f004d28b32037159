"""The readable Wan: laws of its parts, and its file. That it is the host's network is a host test."""

import pytest
import torch
from benchmark_scripts import load
from safetensors.torch import save_file

emoji_wan = load("emoji_wan")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = emoji_wan.EmojiWan(emoji_wan.WanConfig(depth=2)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(rows=8, cols=12, words=5):
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 16, rows, cols, generator=generator), torch.randn(2, words, 64, generator=generator)
    return x, torch.tensor([0.9, 0.2]), context


def test_rotary_attention_depends_on_distance_only():
    """The product of two tokens is the same wherever the pair stands in the grid, and changes with its distance."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 128, generator=generator, dtype=torch.float64)
    angle = emoji_wan.rotary(6, 7).double().unflatten(0, (6, 7))

    def product(at, to):
        turned = [emoji_wan.rotate_pairs(x, angle[place][None]) for x, place in ((q, at), (k, to))]
        return float((turned[0] * turned[1]).sum())

    assert product((0, 0), (2, 3)) == pytest.approx(product((3, 2), (5, 5)), rel=1e-4)
    assert product((0, 0), (2, 3)) != pytest.approx(product((0, 0), (3, 2)), rel=1e-2)
    assert product((0, 0), (0, 3)) != pytest.approx(product((0, 0), (3, 0)), rel=1e-2)


def test_turning_keeps_lengths():
    x = torch.randn(1, 2, 12, 128, generator=torch.Generator().manual_seed(0))
    turned = emoji_wan.rotate_pairs(x, emoji_wan.rotary(3, 4))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_prompts_and_pictures_of_a_batch_do_not_mix(model):
    x, sigma, context = inputs()
    both = model(x, sigma, context, None)
    assert both.shape == x.shape
    for i in range(2):
        alone = model(x[i : i + 1], sigma[i : i + 1], context[i : i + 1], None)
        torch.testing.assert_close(alone[0], both[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["x", "sigma", "context"])
def test_every_input_is_read(model, part):
    call = dict(zip(("x", "sigma", "context"), inputs(), strict=True), pooled=None)
    before = model(**call)
    after = model(**call | {part: 0.9 * call[part]})
    assert (after - before).norm() > 1e-3 * before.norm()


def test_every_parameter_is_read(model):
    x, sigma, context = inputs(4, 4, 2)
    twin = emoji_wan.EmojiWan(model.config)
    twin.load_state_dict(model.state_dict())
    twin(x, sigma, context, None).square().sum().backward()
    unread = [name for name, value in twin.named_parameters() if not value.grad.abs().max() > 0]
    assert unread == []


def test_file_is_read_back_with_its_shape(tmp_path, model):
    save_file({name: value.bfloat16() for name, value in model.state_dict().items()}, tmp_path / "wan.safetensors")
    loaded = emoji_wan.load_emoji_wan(tmp_path / "wan.safetensors")
    assert loaded.config == model.config
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].bfloat16().float()), name
