"""Wan in the host: benchmarks' readable EmojiWan is the host's class, and every variant of it is known to the pack."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).with_name("compare_wan.py")
ADAPTERS = ("face_adapter.", "audio_injector.", "music_")


def test_one_call_agrees(comparison):
    """fp32 on both sides, and the timestep embedding takes cosines of up to 1000 radians: 1e-7 of that."""
    assert len(comparison["errors"]) == 9
    assert max(comparison["errors"].values()) < 1e-4, comparison["errors"]


def test_every_variant_is_recognised_and_its_blocks_are_rounded(comparison):
    variants = comparison["variants"]
    assert {"t2v", "i2v", "VaceWanModel"} < set(variants)
    common = variants["t2v"]["roles"]
    assert len(common) == 10
    for name, variant in variants.items():
        assert variant["family"] == "Wan", name
        assert common.items() <= variant["roles"].items(), name
        # VACE's projections read its control picture and the residual stream
        unknown = {layer for layer, role in variant["roles"].items() if role == "other"}
        assert all(layer.endswith(("before_proj", "after_proj")) for layer in unknown), unknown
        assert not any("blocks." in layer and not layer.startswith(ADAPTERS) for layer in variant["kept"]), name
        assert {"head.head", "time_projection.1", "text_embedding.0"} < set(variant["kept"]), name


def test_what_variants_add_to_the_blocks(comparison):
    variants = comparison["variants"]
    assert variants["i2v"]["roles"]["blocks.N.cross_attn.k_img"] == "context"
    assert {f"vace_{name}" for name in variants["t2v"]["roles"]} < set(variants["VaceWanModel"]["roles"])


def test_videos_are_calibrated_in_the_latent_that_is_given(comparison):
    assert comparison["latents"] == {
        "size": [1, 16, 1, 60, 104],
        "video": [1, 16, 21, 60, 104],
        "both": [[1, 128, 5, 4, 4], [1, 8, 20, 16]],
        "flat": [128 * 80 + 8 * 320, 2 * 16 * 21 * 60 * 104],
    }
