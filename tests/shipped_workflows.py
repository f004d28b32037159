"""The workflows that ship, as API prompts. `python tests/shipped_workflows.py` writes them for the frontend.

Needs a running host for its node definitions; tests/host/test_workflows.py checks that the files still agree.
"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "workflows"


def link(node: str, slot: int = 0) -> list:
    return [node, slot]


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def sampling(model: str, seed: int = 7) -> dict:
    """KSampler on `model`, decoded and saved."""
    return {
        "prompt": node("DiTQuantEmojiPrompts", prompts="lion face", first=0, count=0),
        "empty": node("DiTQuantEmojiPrompts", prompts="", first=0, count=0),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=4),
        "sampler": node(
            "KSampler",
            model=link(model),
            positive=link("prompt"),
            negative=link("empty"),
            latent_image=link("latent"),
            seed=seed,
            steps=20,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": node("DiTQuantDecodeEmoji", samples=link("sampler"), model=link(model), zoom=8),
        "save": node("SaveImage", images=link("decode"), filename_prefix="dit_quant"),
    }


def quantizing(model: str, preset: str) -> dict:
    """Calibrate, group, quantize `model`."""
    return {
        "calibration_prompts": node("DiTQuantEmojiPrompts", prompts="", first=0, count=8),
        "calibrate": node(
            "DiTQuantCalibrate",
            model=link(model),
            positive=link("calibration_prompts"),
            negative=link("empty"),
            prompts="",
            sizes="128x128",
            steps=20,
            cfg=3.0,
            sampler_name="euler",
            scheduler="simple",
            seed=1,
            memory_gb=4.0,
        ),
        "group": node(
            "DiTQuantGroupTimesteps", calibration=link("calibrate"), groups=0, linkage="ward", interpolate=False
        ),
        "quantize": node(
            "DiTQuantQuantize",
            model=link(model),
            calibration=link("group"),
            preset=preset,
            group_size=16,
            skip_layers="",
        ),
    }


PROMPTS = """a lighthouse on a cliff at dusk, long exposure
portrait of an old fisherman, soft window light
a bowl of ramen on a wooden table, seen from above
a red fox in fresh snow
narrow street in Lisbon after the rain, neon signs
watercolor of a mountain lake in autumn
macro photograph of a dew drop on a leaf
a robot reading a newspaper in a cafe, film still
isometric drawing of a small bookshop
an astronaut floating above a coral reef
close-up of an owl's face, studio light
a knight in dented armour, oil painting
a bicycle leaning against a blue door
storm clouds over wheat fields, wide angle
a child's drawing of a dragon, crayons
a glass of iced tea with lemon, product photo"""


def your_model(model: str = "unet") -> dict:
    """A model of the artist's own, here Z-Image-Turbo. model: what is calibrated and quantized."""
    size = {"width": 1024, "height": 1024}
    schedule = {"steps": 9, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
    return {
        "unet": node("UNETLoader", unet_name="z_image_turbo_bf16.safetensors", weight_dtype="default"),
        "clip": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2", device="default"),
        "vae": node("VAELoader", vae_name="ae.safetensors"),
        "calibrate": node(
            "DiTQuantCalibrate", model=link(model), clip=link("clip"), prompts=PROMPTS, sizes="1024x1024", **schedule
        ),
        "group": node("DiTQuantGroupTimesteps", calibration=link("calibrate")),
        "quantize": node("DiTQuantQuantize", model=link(model), calibration=link("group"), preset="W8A8"),
        "file": node("DiTQuantSave", model=link("quantize"), filename_prefix="diffusion_models/my_model_w8a8"),
        "prompt": node("CLIPTextEncode", clip=link("clip"), text="a lighthouse on a cliff at dusk, long exposure"),
        "empty": node("CLIPTextEncode", clip=link("clip"), text=""),
        "latent": node("EmptySD3LatentImage", batch_size=1, **size),
        "sampler": node(
            "KSampler",
            model=link("quantize"),
            positive=link("prompt"),
            negative=link("empty"),
            latent_image=link("latent"),
            seed=7,
            denoise=1.0,
            **schedule,
        ),
        "decode": node("VAEDecode", samples=link("sampler"), vae=link("vae")),
        "save": node("SaveImage", images=link("decode"), filename_prefix="dit_quant"),
    }


# nodes that the files have beside those of the prompts, bypassed: a name each, and the prompt with it
BYPASSED = {
    "quantize_your_model": (
        "lora",
        your_model("lora")
        | {
            "lora": node(
                "LoraLoaderModelOnly", model=link("unet"), lora_name="your_lora.safetensors", strength_model=1.0
            )
        },
    )
}


def workflows() -> dict[str, dict]:
    """File name -> API prompt."""
    loader = {"loader": node("DiTQuantLoadEmoji")}
    saved = node("DiTQuantSave", model=link("quantize"), filename_prefix="diffusion_models/emoji_w8a8")
    return {
        "calibrate_quantize_sample": loader | quantizing("loader", "W8A8") | sampling("quantize") | {"file": saved},
        "load_quantized_sample": {"loader": node("DiTQuantLoad", file="emoji_w8a8_00001_.safetensors")}
        | sampling("loader"),
        "quantize_your_model": your_model(),
    }


TITLES = {
    "lora": "A LoRA to merge (bypassed: Ctrl+B)",
    "unet": "Your model, in 16 bits",
    "calibration_prompts": "Calibration prompts",
    "prompt": "Prompt",
    "empty": "Negative prompt (empty)",
}

# pixels for the reports, pictures and plots that nodes show after a run
ROOM = {
    "DiTQuantCalibrate": 130,
    "DiTQuantGroupTimesteps": 330,
    "DiTQuantLoad": 150,
    "DiTQuantQuantize": 260,
    "DiTQuantSave": 100,
    "SaveImage": 320,
}


def at_comfy_org(folder: str, name: str) -> dict:
    """Where the frontend offers to download a missing file from: as in ComfyUI's own template for this model."""
    files = "https://huggingface.co/Comfy-Org/z_image_turbo/resolve/main/split_files"
    return {"name": name, "url": f"{files}/{folder}/{name}", "directory": folder}


DOWNLOADS = {
    "unet": at_comfy_org("diffusion_models", "z_image_turbo_bf16.safetensors"),
    "clip": at_comfy_org("text_encoders", "qwen_3_4b.safetensors"),
    "vae": at_comfy_org("vae", "ae.safetensors"),
}


def main() -> None:
    from host_server import HostServer, find_host, why_no_host
    from workflow_format import BYPASS, from_prompt, numbered

    host = find_host()
    if host is None:
        raise SystemExit(why_no_host())
    with HostServer(host) as server:
        definitions = server.object_info()
    for name, prompt in workflows().items():
        bypassed, prompt = BYPASSED.get(name, (None, prompt))
        titles = {str(i): TITLES[key] for i, key in enumerate(prompt, start=1) if key in TITLES}
        workflow = from_prompt(numbered(prompt), definitions, titles=titles, room=ROOM)
        for each in workflow["nodes"]:
            key = list(prompt)[each["id"] - 1]
            if key == bypassed:
                each["mode"] = BYPASS
            if key in DOWNLOADS:
                each["properties"]["models"] = [DOWNLOADS[key]]
        (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n")


if __name__ == "__main__":
    main()
