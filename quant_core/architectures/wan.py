"""Wan 2.1 / 2.2 and its relatives: one modulation for all blocks, self-attention, cross-attention to the prompt.

The adaLN Linear is `time_projection.1`, shared by all blocks; each adds a table of its own (`modulation`). No site
can be absorbed block by block, so none declares a producer. All variants of the host have these blocks: text, image
(`k_img`, `v_img`), VACE (a second stack), HuMo (audio in the block), camera, S2V, Animate, SCAIL and WanDancer. What
the last ones add beside them (`audio_injector`, `face_adapter`, `music_encoder`) stays in floating point.
"""

from .family import Family, Role, Site

AUDIO = "audio_cross_attn_wrapper.audio_cross_attn"

WAN = Family(
    name="Wan",
    marker=r"head\.modulation$",
    block=r"(?:vace_)?blocks\.\d+",
    sites=(
        Site(("self_attn.q", "self_attn.k", "self_attn.v"), Role.MODULATED),
        Site(("self_attn.o",), Role.ATTENTION),
        Site(("cross_attn.q",), Role.NORMED),
        Site(("cross_attn.k", "cross_attn.v"), Role.CONTEXT),
        Site(("cross_attn.k_img", "cross_attn.v_img"), Role.CONTEXT),
        Site(("cross_attn.o",), Role.ATTENTION),
        Site((f"{AUDIO}.q",), Role.NORMED),
        Site((f"{AUDIO}.k", f"{AUDIO}.v"), Role.CONTEXT),
        Site((f"{AUDIO}.o",), Role.ATTENTION),
        Site(("ffn.0",), Role.MODULATED),
        Site(("ffn.2",), Role.ACTIVATED),
    ),
)
