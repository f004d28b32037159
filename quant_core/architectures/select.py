"""Which Linears of a model to round."""

import re
from collections.abc import Iterable, Mapping

from .family import MODULATION, OUTSIDE, Family, family_of
from .sd3 import SD3
from .wan import WAN

FAMILIES: tuple[Family, ...] = (SD3, WAN)

SMALLEST = 32
UNET = re.compile(r"(^|\.)(input_blocks\.\d+\.0\.(in_layers|op)|down_blocks\.\d+\.(resnets|\d+\.depthwise))\b")
NUMBERED = re.compile(r"^(?P<stack>(?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*)\.\d+\.(?P<inner>.+)$")
KEEP = (
    (r"(^|\.)(\w*mod(ulation|C|X|CX)?(_[xy])?|adaLN\w*|adaln\w*)(\.|$)", MODULATION),
    (r"(^|\.)(\w*norm\w*\.linear$|to_scale_shift_gate\.|distilled_guidance_layer\.|param_generator$)", MODULATION),
    (r"(embed|gate_logits|gate_modules|router|repo_layers)", "embedder, gate, router or position"),
    (
        r"(^|\.)(llm_adapter|token_refiner|txtfusion|caption_projection|projectors|visual|(lyric|timbre)_encoder"
        r"|(de)?tokenizer)\.",
        "reads the prompt or a reference, not the latent",
    ),
    (r"(^|\.)dec_net\.", "in place of a final layer"),
)


class NotADiT(ValueError):
    """The model has no repeated transformer blocks made of Linear layers."""


def select_layers(
    linears: Mapping[str, tuple[int, int]], parameters: Iterable[str]
) -> tuple[list[str], dict[str, str], Family | None]:
    """linears: name -> (N, K) of every Linear. -> (names to round, kept ones with the reason, the family or None).

    Unknown families: the Linears of numbered blocks that are not modulation, embedders or gates.
    Raises NotADiT for a UNet, or when nothing is left.
    """
    names = list(parameters)
    if any(UNET.search(name) for name in names):
        raise NotADiT("this is a UNet: its convolutions stay in floating point and nothing would be gained; load a DiT")
    family = family_of(names, FAMILIES)
    chosen, kept = [], {}
    for name, (N, K) in linears.items():
        reason = family.reason_to_keep(name) if family else _generic_reason(name)
        if reason is None and min(N, K) < SMALLEST:
            reason = f"tiny: [{N}, {K}]"
        if reason is None:
            chosen.append(name)
        else:
            kept[name] = reason
    if not chosen:
        raise NotADiT(
            f"no DiT blocks with Linear layers found among {len(linears)} Linears; "
            "Diffusion Transformers such as SD3, Flux or Wan are supported"
        )
    return chosen, kept, family


def _generic_reason(name: str) -> str | None:
    if NUMBERED.match(name) is None:
        return OUTSIDE
    return next((reason for pattern, reason in KEEP if re.search(pattern, name)), None)
