"""Stable Diffusion 3 / 3.5: two streams, modulation per block, joint attention."""

from .family import MODULATION, Family, Role, Site


def _stream(stream: str) -> tuple[Site, ...]:
    modulation = f"{stream}.adaLN_modulation.1"
    return (
        Site((f"{stream}.attn.qkv",), Role.MODULATED, modulation=(modulation, 0, 1)),
        Site((f"{stream}.mlp.fc1",), Role.MODULATED, modulation=(modulation, 3, 4)),
        Site((f"{stream}.mlp.fc2",), Role.ACTIVATED),
    )


SD3 = Family(
    name="SD3",
    marker=r"joint_blocks\.0\.context_block\.attn\.qkv\.weight$",
    block=r"joint_blocks\.\d+",
    sites=(
        *_stream("context_block"),
        *_stream("x_block"),
        Site(("x_block.attn2.qkv",), Role.MODULATED, modulation=("x_block.adaLN_modulation.1", 6, 7)),
        Site(("x_block.attn2.proj",), Role.ATTENTION, values=("x_block.attn2.qkv",)),
        Site(
            ("context_block.attn.proj", "x_block.attn.proj"),
            Role.ATTENTION,
            values=("context_block.attn.qkv", "x_block.attn.qkv"),
        ),
    ),
    keep=((r"adaLN_modulation", MODULATION),),
)
