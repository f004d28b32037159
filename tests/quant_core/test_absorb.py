"""Absorption into adaLN and V on the real network, in float64: the whole model must not notice."""

import pytest
import torch
from dit_quant.demo.emoji_dit import DiTConfig, EmojiDiT
from dit_quant.quant_core.absorb import absorb, absorbing_sites
from dit_quant.quant_core.architectures.sd3 import SD3
from dit_quant.quant_core.metrics import relative_l2
from dit_quant.quant_core.reparam import fold_consumer, fold_value

CONFIG = DiTConfig(depth=2, context_dim=32, pooled_dim=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return EmojiDiT(CONFIG).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tensors(model):
    return dict(model.state_dict())


def vectors_for(names, features=CONFIG.hidden, dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(features, dtype=dtype, generator=random)  # noqa: E731
    return {name: (draw(), draw().exp()) for name in names}


def run(model, tensors):
    random = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=random)  # noqa: E731
    inputs = (normal(3, 16, 6, 10), torch.tensor([0.9, 0.5, 0.1]).double(), normal(3, 7, 32), normal(3, 16))
    return torch.func.functional_call(model, tensors, inputs)


def difference(model, before, after):
    return relative_l2(run(model, after), run(model, before))


def test_every_absorbing_site_of_the_family_is_found(tensors):
    sites = absorbing_sites(tensors, SD3)
    first, last = "joint_blocks.0.", "joint_blocks.1."
    expected = {
        *(first + name for name in ("context_block.attn.qkv", "context_block.mlp.fc1", "context_block.attn.proj")),
        *(first + name for name in ("x_block.attn.qkv", "x_block.mlp.fc1")),
        # the last text block only feeds the attention
        *(
            last + name
            for name in ("context_block.attn.qkv", "x_block.attn.qkv", "x_block.mlp.fc1", "x_block.attn.proj")
        ),
    }
    assert set(sites) == expected
    joint = sites["joint_blocks.0.context_block.attn.proj"]
    assert joint.consumers == ("joint_blocks.0.context_block.attn.proj", "joint_blocks.0.x_block.attn.proj")


@pytest.mark.parametrize("suffix", ["attn.qkv", "mlp.fc1", "attn.proj", ""], ids=["qkv", "fc1", "proj", "all"])
def test_model_is_unchanged_by_absorption(model, tensors, suffix):
    chosen = [name for name in absorbing_sites(tensors, SD3) if name.endswith(suffix)]
    done = absorb(tensors, SD3, vectors_for(chosen))
    assert not done.refused
    changed = {key for key in tensors if not torch.equal(tensors[key], done.tensors[key])}
    assert {name + ".weight" for name in chosen} < changed
    assert difference(model, tensors, done.tensors) < 1e-10


def test_one_z_may_come_as_a_table_of_one_group(tensors):
    name = "joint_blocks.0.x_block.mlp.fc1"
    z, s = vectors_for([name])[name]
    flat, table = absorb(tensors, SD3, {name: (z, s)}), absorb(tensors, SD3, {name: (z[None], s)})
    assert all(torch.equal(flat.tensors[key], table.tensors[key]) for key in tensors)


@pytest.mark.parametrize(
    "reverted",
    [
        ["x_block.mlp.fc1.bias"],
        ["x_block.mlp.fc1.weight"],
        ["x_block.adaLN_modulation.1.weight", "x_block.adaLN_modulation.1.bias"],
    ],
    ids=["no bias correction", "weight not rescaled", "producer untouched"],
)
def test_half_a_modulation_fold_is_noticed(model, tensors, reverted):
    """Negative control: each half of the fold alone changes the picture."""
    name = "joint_blocks.0.x_block.mlp.fc1"
    done = absorb(tensors, SD3, vectors_for([name])).tensors
    broken = done | {f"joint_blocks.0.{key}": tensors[f"joint_blocks.0.{key}"] for key in reverted}
    assert difference(model, tensors, broken) > 1e-3


def test_folding_one_stream_of_a_joint_attention_is_noticed(model, tensors):
    """Negative control: every query mixes text and image V, so both must take z and s."""
    block = "joint_blocks.0."
    site = block + "context_block.attn.proj"
    done = absorb(tensors, SD3, vectors_for([site])).tensors
    text = block + "context_block.attn.qkv"
    broken = done | {key: tensors[key] for key in (f"{text}.weight", f"{text}.bias")}
    assert difference(model, tensors, broken) > 1e-3


def test_folds_written_out_by_hand_agree_with_the_declared_site(tensors):
    """The spec's chunk indices against the layout that EmojiDiT reads: shift, scale, gate, shift, scale, gate."""
    K, block = CONFIG.hidden, "joint_blocks.0."
    names = [block + "x_block.mlp.fc1", block + "context_block.attn.proj"]
    vectors = vectors_for(names)
    done = absorb(tensors, SD3, vectors).tensors
    z, s = vectors[names[0]]
    old = tensors[block + "x_block.adaLN_modulation.1.bias"].clone()
    old[3 * K : 4 * K] = (old[3 * K : 4 * K] - z) / s
    old[4 * K : 5 * K] = (1 + old[4 * K : 5 * K]) / s - 1
    # the same float64 arithmetic, differently ordered
    torch.testing.assert_close(done[block + "x_block.adaLN_modulation.1.bias"], old, rtol=1e-14, atol=1e-14)
    z, s = vectors[names[1]]
    for stream in ("context_block", "x_block"):
        qkv, proj = f"{block}{stream}.attn.qkv", f"{block}{stream}.attn.proj"
        pair = tensors[f"{qkv}.weight"], tensors[f"{qkv}.bias"]
        weight, bias = fold_value(*pair, value_rows=slice(2 * K, 3 * K), z=z, s=s)
        assert torch.equal(done[f"{qkv}.weight"], weight)
        assert torch.equal(done[f"{qkv}.bias"], bias)
        assert torch.equal(
            done[f"{proj}.weight"], fold_consumer(*(tensors[f"{proj}.{p}"] for p in ("weight", "bias")), z, s)[0]
        )


def test_a_site_that_loses_precision_is_left_alone_and_listed(tensors):
    """In fp32, z = 1e6 drowns the bias it is added to: the numeric check sees it."""
    single = {key: value.float() for key, value in tensors.items()}
    good, bad = "joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.mlp.fc1"
    vectors = vectors_for([good, bad])
    vectors[bad] = (vectors[bad][0] * 1e6, vectors[bad][1])
    done = absorb(single, SD3, vectors)
    assert list(done.refused) == [bad]
    assert "differ" in done.refused[bad]
    assert torch.equal(done.tensors[f"{bad}.weight"], single[f"{bad}.weight"])
    assert not torch.equal(done.tensors[f"{good}.weight"], single[f"{good}.weight"])
    assert all(value.dtype is torch.float32 for value in done.tensors.values())


def test_the_original_is_not_modified(tensors):
    before = {key: value.clone() for key, value in tensors.items()}
    absorb(tensors, SD3, vectors_for(absorbing_sites(tensors, SD3)))
    assert all(torch.equal(before[key], tensors[key]) for key in before)


NAME = "joint_blocks.0.x_block.attn.qkv"
ONES = torch.ones(CONFIG.hidden)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({NAME: (torch.zeros(3, CONFIG.hidden), ONES)}, "3 timestep groups cannot be absorbed"),
        ({NAME: (ONES[:-1], ONES)}, "K=128"),
        ({NAME: (ONES, ONES[None, :-1])}, "K=128"),
        ({NAME: (ONES, 0 * ONES)}, "positive"),
        ({NAME: (ONES / 0, ONES)}, "finite"),
        ({"joint_blocks.0.x_block.mlp.fc2": (ONES, ONES)}, "fc2 is not a site"),
        ({"final_layer.linear": (ONES, ONES)}, "final_layer.linear is not a site"),
    ],
    ids=["groups", "short z", "short s", "zero s", "infinite z", "behind GELU", "outside the blocks"],
)
def test_what_cannot_be_absorbed_is_refused_by_name(tensors, vectors, message):
    with pytest.raises(ValueError, match=message):
        absorb(tensors, SD3, vectors)


def test_a_missing_bias_is_refused(tensors):
    without = {key: value for key, value in tensors.items() if key != f"{NAME}.bias"}
    with pytest.raises(ValueError, match="no bias to carry z"):
        absorb(without, SD3, vectors_for([NAME]))
