"""Fragments of API prompts for the host tests: merged with `|`, their keys are the node ids."""

from shipped_workflows import link, node

STEPS = 8
POSITIVE, CALIBRATION_PROMPTS = "lion face", 2
NO_COVARIANCE = {"memory_gb": 0.0}  # nearest rounding: much faster where the codes themselves do not matter
SAMPLING = {"steps": STEPS, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple"}

__all__ = [
    "BASE",
    "NO_COVARIANCE",
    "POSITIVE",
    "SAMPLING",
    "STEPS",
    "again",
    "bundled",
    "calibrate",
    "group",
    "link",
    "load",
    "lora",
    "node",
    "quantize",
    "report",
    "sample",
    "save",
    "saved_name",
    "trace",
]


def bundled(name: str = "model") -> dict:
    """The DiT that ships with the pack."""
    return {name: node("DiTQuantLoadEmoji")}


def texts() -> dict:
    """Prompts to calibrate on and to sample, and the empty latent."""
    return {
        "calibration_prompts": node("DiTQuantEmojiPrompts", prompts="", first=0, count=CALIBRATION_PROMPTS),
        "positive": node("DiTQuantEmojiPrompts", prompts=POSITIVE, first=0, count=0),
        "negative": node("DiTQuantEmojiPrompts", prompts="", first=0, count=0),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=2),
    }


BASE = bundled() | texts()


def again(nonce: int, model: str = "model", name: str = "again") -> dict:
    """The same MODEL, but another `nonce` makes the host run everything behind it anew."""
    return {name: node("DiTQuantTestAgain", model=link(model), nonce=nonce)}


def lora(file: str, model: str = "model", name: str = "lora", strength: float = 1.0) -> dict:
    return {name: node("LoraLoaderModelOnly", model=link(model), lora_name=file, strength_model=strength)}


def calibrate(model: str = "model", name: str = "calibration", **changes) -> dict:
    inputs = {
        "model": link(model),
        "positive": link("calibration_prompts"),
        "negative": link("negative"),
        "prompts": "",
        "sizes": "128x128",
        **SAMPLING,
        "seed": 1,
        "memory_gb": 2.0,
        **changes,
    }
    return {name: node("DiTQuantCalibrate", **{key: value for key, value in inputs.items() if value is not None})}


def group(calibration: str = "calibration", name: str = "groups", **changes) -> dict:
    inputs = {"calibration": link(calibration), "groups": 0, "linkage": "ward", "interpolate": False, **changes}
    return {name: node("DiTQuantGroupTimesteps", **inputs)}


def quantize(
    preset: str = "W8A8",
    model: str = "model",
    calibration: str | None = "groups",
    name: str = "quantized",
    **changes,
) -> dict:
    inputs = {"model": link(model), "preset": preset, "group_size": 16, "skip_layers": "", **changes}
    if calibration is not None:
        inputs["calibration"] = link(calibration)
    return {name: node("DiTQuantQuantize", **inputs)}


def sample(model: str, name: str, **changes) -> dict:
    """KSampler on `model` and its latents saved; `name` is the node id under which the test finds them."""
    inputs = {
        "model": link(model),
        "positive": link("positive"),
        "negative": link("negative"),
        "latent_image": link("latent"),
        "seed": 7,
        **SAMPLING,
        "denoise": 1.0,
        **changes,
    }
    sampler = f"{name} sampler"
    return {
        sampler: node("KSampler", **inputs),
        name: node("SaveLatent", samples=link(sampler), filename_prefix=f"latents/{name}"),
    }


def saved_name(name: str) -> str:
    """The file that `save` writes first under `name`, as loaders list it."""
    return f"{name}_00001_.safetensors"


def save(model: str, file: str) -> dict:
    """Writes output/diffusion_models/<file>_00001_.safetensors."""
    return {f"{file} file": node("DiTQuantSave", model=link(model), filename_prefix=f"diffusion_models/{file}")}


def load(file: str, name: str = "quantized") -> dict:
    return {name: node("DiTQuantLoad", file=saved_name(file))}


def trace(model: str, name: str) -> dict:
    """Every model call of the MODEL recorded in output/traces/<name>.jsonl."""
    return {f"{name} traced": node("DiTQuantTestTrace", model=link(model), name=name)}


def report(history, name: str) -> str:
    """The text that a node shows."""
    return "\n".join(history.outputs[name]["text"])
