"""The specs of SD3 and Wan against the networks that they describe, and the choice of layers."""

import pytest
import torch
from benchmark_scripts import load
from dit_quant.demo.emoji_dit import DiTConfig, EmojiDiT
from dit_quant.quant_core.absorb import absorbing_sites
from dit_quant.quant_core.architectures import FAMILIES, NotADiT, Role, family_of, select_layers
from dit_quant.quant_core.architectures.sd3 import SD3
from dit_quant.quant_core.architectures.wan import WAN
from host_layers import NAMES
from torch import nn


@pytest.fixture(scope="module")
def linears():
    with torch.device("meta"):
        model = EmojiDiT(DiTConfig(depth=2))
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: (m.out_features, m.in_features) for name, m in found.items()}, set(model.state_dict())


def test_marker_finds_the_family_and_nothing_else(linears):
    _, keys = linears
    assert family_of(keys, FAMILIES) is SD3
    assert family_of([], FAMILIES) is None
    assert family_of(["double_blocks.0.img_attn.qkv.weight"], FAMILIES) is None


def test_every_linear_is_rounded_or_kept_for_a_reason(linears):
    shapes, keys = linears
    chosen, kept, family = select_layers(shapes, keys)
    assert family is SD3
    assert set(chosen) | set(kept) == set(shapes)
    assert not set(chosen) & set(kept)
    assert all(kept.values())
    # 2 blocks x 2 streams x (qkv, proj, fc1, fc2), the last text block has qkv only
    assert len(chosen) == 2 * 2 * 4 - 3
    assert not any("adaLN" in name or "embedder" in name or "final_layer" in name for name in chosen)


def test_every_chosen_layer_has_the_role_of_its_producer(linears):
    shapes, keys = linears
    chosen, _, _ = select_layers(shapes, keys)
    roles = {"qkv": Role.MODULATED, "fc1": Role.MODULATED, "proj": Role.ATTENTION, "fc2": Role.ACTIVATED}
    assert {name: SD3.role(name) for name in chosen} == {name: roles[name.rpartition(".")[2]] for name in chosen}


def test_every_name_of_the_spec_exists_in_the_network(linears):
    shapes, _ = linears
    own = {name.removeprefix("joint_blocks.0.") for name in shapes if name.startswith("joint_blocks.0.")}
    for site in SD3.sites:
        if any("attn2" in name for name in site.consumers):  # SD3.5 medium only
            continue
        names = {*site.consumers, *site.values, *([site.modulation[0]] if site.modulation else [])}
        assert names <= own


@pytest.mark.parametrize(
    "name", ["final_layer.linear", "x_embedder.proj", "context_embedder", "joint_blocks.x.mlp.fc1"]
)
def test_outside_the_blocks_everything_is_kept(name):
    assert SD3.split(name) is None
    assert SD3.role(name) is Role.OTHER
    assert "outside" in SD3.reason_to_keep(name)


def test_block_and_rest_are_split():
    assert SD3.split("joint_blocks.12.x_block.mlp.fc1") == ("joint_blocks.12", "x_block.mlp.fc1")


def test_unknown_transformers_are_rounded_in_their_blocks_only():
    shapes = {
        "patch_in": (64, 64),
        "blocks.0.attn.to_q": (64, 64),
        "blocks.0.ff.net.0": (256, 64),
        "blocks.0.adaLN_modulation.1": (384, 64),
        "blocks.0.tiny": (16, 64),
        "final": (64, 64),
    }
    chosen, kept, family = select_layers(shapes, [f"{name}.weight" for name in shapes])
    assert family is None
    assert chosen == ["blocks.0.attn.to_q", "blocks.0.ff.net.0"]
    assert "modulation" in kept["blocks.0.adaLN_modulation.1"]
    assert "outside" in kept["final"]
    assert "tiny" in kept["blocks.0.tiny"]


@pytest.mark.parametrize(
    "name",
    [
        "double_layers.0.modC.1",
        "double_layers.0.modX.1",
        "single_layers.3.modCX.1",
        "blocks.0.mod_x",
        "blocks.0.mod_y",
        "transformer.layers.3.to_scale_shift_gate.1",
        "double_blocks.0.img_mod.lin",
        "single_blocks.0.modulation.lin",
        "blocks.0.adaln_modulation_self_attn.1",
        "blocks.0.adaLN_modulation_img.0",
        "transformer_blocks.0.txt_mod.1",
        "blocks.0.default_modulation.1",
        "transformer_blocks.0.norm1.linear",
    ],
)
def test_modulation_of_any_model_is_kept(name):
    chosen, kept, _ = select_layers({name: (64, 64), "blocks.0.mlp.fc1": (64, 64)}, [f"{name}.weight"])
    assert chosen == ["blocks.0.mlp.fc1"]
    assert "modulation" in kept[name]


# what tells the two families that are described from all others
MARKERS = {"SD3": "joint_blocks.0.context_block.attn.qkv.weight"} | {
    name: "head.modulation" for name in NAMES if name.startswith("Wan")
}


@pytest.mark.parametrize("model", NAMES)
def test_of_every_model_the_blocks_are_rounded_and_what_steers_them_is_kept(model):
    rounded, kept = NAMES[model]
    shapes = dict.fromkeys([*rounded, *kept], (64, 64))
    chosen, reasons, family = select_layers(shapes, [*(f"{n}.weight" for n in shapes), MARKERS.get(model, "x")])
    assert (family is None) == (model not in MARKERS)
    assert chosen == list(rounded)
    assert set(reasons) == set(kept)


@pytest.mark.parametrize("name", ["blocks.0.model.fc", "blocks.0.modern", "blocks.0.mode_x", "layers.1.mlp.scale_up"])
def test_names_that_begin_alike_are_rounded(name):
    assert select_layers({name: (64, 64)}, [f"{name}.weight"])[0] == [name]


def test_a_unet_and_a_model_without_blocks_are_refused():
    cascade = "down_blocks.0.0.depthwise.weight"
    for name in ("input_blocks.1.0.in_layers.2.weight", "down_blocks.0.resnets.1.conv1.weight", cascade):
        with pytest.raises(NotADiT, match="UNet"):
            select_layers({"blocks.0.fc": (64, 64)}, [name])
    with pytest.raises(NotADiT, match="no DiT blocks"):
        select_layers({"head": (64, 64)}, ["head.weight"])
    with pytest.raises(NotADiT):
        select_layers({}, [])


WAN_ROLES = {
    **{f"self_attn.{name}": Role.MODULATED for name in "qkv"},
    "self_attn.o": Role.ATTENTION,
    "cross_attn.q": Role.NORMED,
    "cross_attn.k": Role.CONTEXT,
    "cross_attn.v": Role.CONTEXT,
    "cross_attn.o": Role.ATTENTION,
    "ffn.0": Role.MODULATED,
    "ffn.2": Role.ACTIVATED,
}


@pytest.fixture(scope="module")
def wan():
    emoji_wan = load("emoji_wan")
    with torch.device("meta"):
        model = emoji_wan.EmojiWan(emoji_wan.WanConfig(depth=2))
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: (m.out_features, m.in_features) for name, m in found.items()}, set(model.state_dict())


def test_wan_rounds_its_blocks_and_keeps_the_rest(wan):
    shapes, keys = wan
    assert family_of(keys, FAMILIES) is WAN
    chosen, kept, family = select_layers(shapes, keys)
    assert family is WAN
    assert {name: WAN.role(name) for name in chosen} == {
        f"blocks.{i}.{name}": role for i in range(2) for name, role in WAN_ROLES.items()
    }
    assert set(kept) == {
        *("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
        *("time_projection.1", "head.head"),
    }


def test_wan_declares_no_producer_to_absorb_into(wan):
    """The adaLN Linear is shared by all blocks: a fold into it for one block would change the others."""
    _, keys = wan
    assert absorbing_sites(dict.fromkeys(keys, torch.zeros(1)), WAN) == {}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blocks.39.cross_attn.v_img", Role.CONTEXT),
        ("vace_blocks.3.ffn.0", Role.MODULATED),
        ("vace_blocks.0.before_proj", Role.OTHER),
        ("blocks.0.audio_cross_attn_wrapper.audio_cross_attn.q", Role.NORMED),
    ],
)
def test_variants_of_wan_have_more_in_their_blocks(name, role):
    chosen, kept, family = select_layers({name: (64, 64)}, ["head.modulation", f"{name}.weight"])
    assert family is WAN
    assert (chosen, kept) == ([name], {})
    assert WAN.role(name) is role


@pytest.mark.parametrize(
    "name", ["img_emb.proj.1", "face_adapter.fuser_blocks.0.linear2", "audio_injector.injector.0.q", "head.head"]
)
def test_what_variants_of_wan_add_beside_the_blocks_is_kept(name):
    _, kept, _ = select_layers({name: (64, 64), "blocks.0.ffn.0": (64, 64)}, ["head.modulation", f"{name}.weight"])
    assert set(kept) == {name}
    assert "outside" in kept[name]
