"""Calibrate DiT: samples the artist's prompts and records what every layer sees."""

import re

import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io, ui

from .host.drawing import TO_THE_END, Settings
from .host.paths import calibration_folder
from .host.sampling import Progress, calibrate
from .schema import CalibrationType, schema

# of a side, as in the host's own nodes
LARGEST = 16384


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """'1024x1024, 768x1344' -> ((1024, 1024), (768, 1344)). Raises ValueError naming what does not parse."""
    sizes = []
    for part in filter(None, re.split(r"[,\s]+", text.strip())):
        found = re.fullmatch(r"(\d+)[xX](\d+)", part)
        if found is None or not all(16 <= int(side[:9]) <= LARGEST for side in found.groups()):
            raise ValueError(
                f"size {part!r} is not WIDTHxHEIGHT of 16x16 to {LARGEST}x{LARGEST} pixels; write for example 1024x1024"
            )
        sizes.append((int(found[1]), int(found[2])))
    if not sizes:
        raise ValueError("no latent size given; write for example 1024x1024")
    return tuple(sizes)


def encode(clip, text: str) -> list:
    """Text -> CONDITIONING, as the host's text encode node does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def prompt_list(clip, prompts: str, positive: list | None) -> list[list]:
    """One CONDITIONING per non-empty line and per entry of `positive`."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if lines and clip is None:
        raise ValueError("prompts are written, but no CLIP is connected; connect one, or connect `positive` instead")
    return [encode(clip, line) for line in lines] + [[entry] for entry in positive or []]


class CalibrateDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DiTQuantCalibrate",
            display_name="Calibrate DiT",
            description="Samples your prompts and records how the activations of every layer drift with the noise.",
            search_aliases=["quantize", "calibration", "int8", "w8a8", "w4a8", "htg", "ptq"],
            inputs=[
                io.Model.Input("model", tooltip="The model to quantize, with the LoRAs that are to be merged."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the prompts below."),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="Prompts as a conditioning; every entry is one prompt.",
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="Negative prompt; empty if not connected."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    tooltip="One prompt per line, like those you will use: 16 do at 8 bits, at 4 bits 64 and more pay.",
                ),
                io.String.Input("sizes", default="1024x1024", tooltip="Sizes, taken in turn: 1024x1024, 768x1344"),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="Sampled instead of `sizes`: the empty latent of a video, or of sound.",
                ),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="As many steps as you will sample with."),
                io.Float.Input(
                    "cfg", default=4.5, min=0.0, max=100.0, step=0.1, tooltip="The guidance you will sample with."
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="Decides which noise levels are seen; any other sampler works with the result too.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.KSampler.SCHEDULERS,
                    default="simple",
                    tooltip="The spacing of the noise levels; any other scheduler works with the result too.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Noise of the first prompt; each further prompt takes the next seed.",
                ),
                io.Float.Input(
                    "memory_gb",
                    default=4.0,
                    min=0.0,
                    max=256.0,
                    step=0.5,
                    advanced=True,
                    tooltip="Main memory for all statistics. Most of it holds covariances and curvatures, which "
                    "calibrated rounding needs. 0 switches those off and limits nothing else.",
                ),
                io.Int.Input(
                    "passes",
                    default=1,
                    min=1,
                    max=8,
                    optional=True,
                    advanced=True,
                    tooltip="How often the prompts may be sampled, each time for another part of the layers, so that "
                    "wide covariances fit the memory. No more passes are made than that takes.",
                ),
                io.Boolean.Input(
                    "measure_sensitivity",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Needed by the preset 'fit to size'. Costs 12 more sampling steps for every layer.",
                ),
                io.Boolean.Input(
                    "measure_curvature",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Runs one call in 14 backwards too, to see which rounding errors reach the picture: much "
                    "better 4-bit weights. Needs memory for the activations of one block; where that fails, the "
                    "report says so and all else goes on.",
                ),
                io.Int.Input(
                    "start_at_step",
                    default=0,
                    min=0,
                    max=TO_THE_END,
                    optional=True,
                    advanced=True,
                    tooltip="As in KSampler (Advanced), for a model that samples a part of the steps.",
                ),
                io.Int.Input(
                    "end_at_step",
                    default=TO_THE_END,
                    min=1,
                    max=TO_THE_END,
                    optional=True,
                    advanced=True,
                    tooltip="As in KSampler (Advanced), for a model that samples a part of the steps.",
                ),
                io.Model.Input(
                    "model_before",
                    optional=True,
                    tooltip="Samples the steps before start_at_step, as Wan 2.2's high noise model does for the low "
                    "noise one; may be quantized. Not connected: the model itself does.",
                ),
            ],
            outputs=[CalibrationType.Output(display_name="calibration"), io.String.Output(display_name="report")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        prompts,
        sizes,
        steps,
        cfg,
        sampler_name,
        scheduler,
        seed,
        memory_gb,
        passes=1,
        measure_sensitivity=False,
        measure_curvature=True,
        clip=None,
        positive=None,
        negative=None,
        latent=None,
        start_at_step=0,
        end_at_step=TO_THE_END,
        model_before=None,
    ) -> io.NodeOutput:
        conditions = prompt_list(clip, prompts, positive)
        if negative is None:
            if conditions and clip is None and cfg != 1.0:
                raise ValueError("connect `negative` (or a CLIP, to encode an empty one): cfg is not 1")
            negative = encode(clip, "") if clip is not None else [conditions[0][0]] if conditions else []
        settings = Settings(
            parse_sizes(sizes),
            steps,
            cfg,
            sampler_name,
            scheduler,
            seed,
            memory_gb,
            passes,
            measure_sensitivity,
            measure_curvature,
            latent,
            start_at_step,
            end_at_step,
        )
        bar = comfy.utils.ProgressBar(max(len(conditions), 1) * steps, node_id=cls.hidden.unique_id)
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

        def step(done: int, total: int, denoised) -> None:
            preview = None
            if previewer is not None and denoised is not None:
                # of pictures and their sound the pictures
                denoised = denoised.unbind()[0] if denoised.is_nested else denoised
                preview = previewer.decode_latent_to_preview_image("JPEG", denoised)
            bar.update_absolute(done, total, preview)

        notes: list[str] = []
        progress = Progress(step, notes)
        result = calibrate(model, conditions, negative, settings, calibration_folder(), progress, model_before)
        text = "\n".join(
            [f"{len(result.layers)} layers, {len(conditions)} prompts, {len(result.sigmas)} noise levels", *notes]
        )
        return io.NodeOutput(result, text, ui=ui.PreviewText(text))
