"""Run by the host's own interpreter in the host's folder: the demo's EmojiDiT against the host's class, as JSON.

usage: python compare_reference.py PACK_ROOT
"""

import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(sys.argv[1])
sys.argv[1:] = ["--cpu"]
sys.path[0] = str(Path.cwd())

import comfy.options  # noqa: E402 - the host reads its arguments while it is imported

comfy.options.enable_args_parsing()

import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402


def bind_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        "dit_quant", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["dit_quant"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


bind_pack()
from dit_quant.demo.emoji_dit import load_emoji_dit  # noqa: E402
from dit_quant.demo.prompts import load_prompt_table  # noqa: E402
from dit_quant.demo.sampler import sample, seeded_noise, shifted_sigmas  # noqa: E402
from dit_quant.quant_core.metrics import relative_l2  # noqa: E402

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
