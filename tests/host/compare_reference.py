"""Run by the host's own interpreter in the host's folder: the demo's EmojiDiT against the host's class, as JSON.

usage: python compare_reference.py PACK_ROOT
"""

import json

from in_host import ROOT

# isort: split
import comfy.samplers
import comfy.sd
import torch
from dit_quant.demo.emoji_dit import load_emoji_dit
from dit_quant.demo.prompts import load_prompt_table
from dit_quant.demo.sampler import sample, seeded_noise, shifted_sigmas
from dit_quant.quant_core.metrics import relative_l2

ASSETS = ROOT / "demo" / "assets"
STEPS = 8


@torch.inference_mode()
def main() -> None:
    patcher = comfy.sd.load_diffusion_model(str(ASSETS / "emoji_dit.safetensors"), {"dtype": torch.float32})
    host, ours = patcher.model, load_emoji_dit(ASSETS / "emoji_dit.safetensors")
    table = load_prompt_table(ASSETS / "emoji_prompts.safetensors")

    def host_velocity(x, sigma, context, pooled):
        """Through the host's own wrapping of the model: denoised = x - sigma v."""
        denoised = host.apply_model(x, sigma, c_crossattn=context, y=pooled)
        return (x - denoised) / sigma[:, None, None, None]

    context, pooled = table.encode(["lion face", "taco", ""])
    generator = torch.Generator().manual_seed(3)
    errors = {}
    for shape in ((16, 16), (12, 20), (8, 8)):
        for sigma in (1.0, 0.6, 0.05):
            x = torch.randn(3, 16, *shape, generator=generator)
            level = torch.full((3,), sigma)
            errors[f"{shape} {sigma}"] = relative_l2(
                host.diffusion_model(x, level * 1000, context=context, y=pooled), ours(x, level, context, pooled)
            )
    prompt, empty = table.encode(["lion face"]), table.encode([""])
    expected = sample(ours, seeded_noise([5]), prompt, empty, steps=STEPS)
    found = sample(host_velocity, seeded_noise([5]), prompt, empty, steps=STEPS)
    schedule = comfy.samplers.calculate_sigmas(host.model_sampling, "simple", STEPS)
    print(
        json.dumps(
            {
                "dtype": str(host.get_dtype()),
                "errors": errors,
                "euler": relative_l2(found, expected),
                "schedule": float((schedule - shifted_sigmas(STEPS)).abs().max()),
                "latent_is_used": min(float(expected.std()), float(found.std())),
            }
        )
    )


main()
