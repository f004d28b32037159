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


def workflows() -> dict[str, dict]:
    """File name -> API prompt."""
    loader = {"loader": node("DiTQuantLoadEmoji")}
    lora = node("LoraLoaderModelOnly", model=link("loader"), lora_name="emoji_lora.safetensors", strength_model=1.0)
    saved = node("DiTQuantSave", model=link("quantize"), filename_prefix="diffusion_models/emoji_w8a8")
    plot = node("PreviewImage", images=link("group", 1))
    return {
        "calibrate_quantize_sample": loader
        | quantizing("loader", "W8A8")
        | sampling("quantize")
        | {"plot": plot, "file": saved},
        "load_quantized_sample": {"loader": node("DiTQuantLoad", file="emoji_w8a8_00001_.safetensors")}
        | sampling("loader"),
        "quantize_with_lora": loader | {"lora": lora} | quantizing("lora", "W4A8") | sampling("quantize"),
    }


TITLES = {
    "calibration_prompts": "Calibration prompts",
    "prompt": "Prompt",
    "empty": "Negative prompt (empty)",
    "plot": "Groups and drift",
}


def main() -> None:
    from host_server import HostServer, find_host, why_no_host
    from workflow_format import from_prompt, numbered

    host = find_host()
    if host is None:
        raise SystemExit(why_no_host())
    with HostServer(host) as server:
        definitions = server.object_info()
    for name, prompt in workflows().items():
        titles = {str(i): TITLES[key] for i, key in enumerate(prompt, start=1) if key in TITLES}
        workflow = from_prompt(numbered(prompt), definitions, titles=titles)
        (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n")


if __name__ == "__main__":
    main()
