"""Demo nodes for the bundled emoji DiT: load it, encode its prompts, decode its latents."""

import comfy.sd
import torch
from comfy_api.latest import io

from ..demo.pixels import to_rgb
from ..demo.prompts import load_prompt_table
from .host.paths import ASSETS
from .schema import schema


class LoadEmojiDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DiTQuantLoadEmoji",
            display_name="Load Emoji DiT (demo)",
            description="The small trained DiT that ships with the pack, to try the nodes without a download.",
            search_aliases=["demo", "emoji"],
            inputs=[],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(comfy.sd.load_diffusion_model(str(ASSETS / "emoji_dit.safetensors")))


class EmojiPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DiTQuantEmojiPrompts",
            display_name="Emoji Prompts (demo)",
            description="Encodes emoji names for the bundled DiT, one per line; every line is one conditioning entry.",
            search_aliases=["demo", "emoji", "text encode"],
            inputs=[
                io.String.Input("prompts", multiline=True, default="lion face", tooltip="Empty: the negative prompt."),
                io.Int.Input(
                    "first",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="With `count`: take trained prompts from this one on.",
                    advanced=True,
                ),
                io.Int.Input(
                    "count",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Take this many trained prompts instead of the text.",
                    advanced=True,
                ),
            ],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, prompts, first=0, count=0) -> io.NodeOutput:
        table = load_prompt_table(ASSETS / "emoji_prompts.safetensors")
        lines = [line.strip() for line in prompts.splitlines() if line.strip()] or [""]
        if count:
            lines = [table.prompts[(first + i) % len(table.prompts)] for i in range(count)]
        context, pooled = table.encode(lines)
        return io.NodeOutput([[context[i : i + 1], {"pooled_output": pooled[i : i + 1]}] for i in range(len(lines))])


class DecodeEmoji(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DiTQuantDecodeEmoji",
            display_name="Decode Emoji (demo)",
            description="Turns the bundled DiT's space-to-depth latents into pictures; no VAE is needed.",
            search_aliases=["demo", "emoji", "vae decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="From KSampler."),
                io.Model.Input("model", tooltip="For its latent scaling."),
                io.Int.Input("zoom", default=8, min=1, max=32, tooltip="Enlarges every pixel."),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples, model, zoom) -> io.NodeOutput:
        latent = model.get_model_object("latent_format").process_in(samples["samples"])
        pictures = to_rgb(latent).permute(0, 2, 3, 1)
        enlarged = pictures.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
        return io.NodeOutput(enlarged.to(torch.float32).cpu())
