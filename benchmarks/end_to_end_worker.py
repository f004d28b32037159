"""Run by the host's own interpreter: makes, quantizes or times one model through the host, prints JSON.

usage: python end_to_end_worker.py HOST_ROOT PACK_ROOT JOB   (JOB is JSON; see `main`)
"""

import importlib.util
import itertools
import json
import sys
import time
from pathlib import Path

HOST, PACK, JOB = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
sys.argv[1:] = JOB.get("flags", [])
sys.path[0] = str(HOST)

import comfy.options  # noqa: E402 - the host reads its arguments while it is imported

comfy.options.enable_args_parsing()

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402


def bind(name: str, path: Path, **options):
    """Imports a file under a name of our own: nothing of ours goes on sys.path."""
    spec = importlib.util.spec_from_file_location(name, path, **options)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bind("dit_quant", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
host_models = bind("host_models", PACK / "benchmarks" / "host_models.py")

from dit_quant.nodes.files import METADATA, load_quantized  # noqa: E402
from dit_quant.nodes.host.drawing import Settings  # noqa: E402
from dit_quant.nodes.host.quantized import compute_dtype, quantize  # noqa: E402
from dit_quant.nodes.host.sampling import Progress, calibrate  # noqa: E402
from dit_quant.nodes.host.weights import float_state, full_state, quantized_state, select, weight_loaders  # noqa: E402
from dit_quant.quant_core.checkpoint import VERSION  # noqa: E402
from dit_quant.quant_core.files import write_tensors  # noqa: E402
from dit_quant.quant_core.schemes import PRESETS, Rounding  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NATIVE = {
    "native int8": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True}, {}),
    "native int8 + ConvRot": ("int8_tensorwise", "TensorWiseINT8Layout", {"per_channel": True, "convrot": True}, {}),
    "native asym_w4a8_int8": ("asym_w4a8_int8", "AsymW4A8Int8Layout", {}, {}),
}


def latent(size: int) -> torch.Tensor:
    model = host_models.MODELS[JOB["model"]]
    return torch.zeros(1, model.channels, size // model.ratio, size // model.ratio)


def conditioning() -> list:
    model = host_models.MODELS[JOB["model"]]
    generator = torch.Generator().manual_seed(1)
    width, tokens = model.context
    text = torch.randn(1, tokens, width, generator=generator)
    extra = {"pooled_output": torch.randn(1, model.pooled, generator=generator)} if model.pooled else {}
    return [[text, extra]]


def sample(patcher, steps: int, callback=None) -> torch.Tensor:
    zeros, condition = latent(JOB["size"]), conditioning()
    noise = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(2))
    return comfy.sample.sample(
        patcher, noise, steps, 1.0, "euler", "simple", condition, condition, zeros, callback=callback, seed=2
    )


def load_float(dtype: torch.dtype):
    """The model in full precision, its arithmetic in `dtype`: the host would fall back to fp32 on a CPU."""
    patcher = comfy.sd.load_diffusion_model(JOB["source"], {"dtype": dtype})
    patcher.set_model_compute_dtype(dtype)
    return patcher


def make() -> dict:
    """A file of random weights."""
    state = host_models.random_state(JOB["model"], JOB["depth"], DTYPES[JOB["dtype"]])
    write_tensors(Path(JOB["source"]), state, {})
    return {"parameters": sum(value.numel() for value in state.values())}


def convert() -> dict:
    """Files in our formats (real tables from one prompt, codes rounded to nearest: speed asks no more) and native."""
    folder, patcher = Path(JOB["folder"]), load_float(DTYPES[JOB["dtype"]])
    settings = Settings(((JOB["size"], JOB["size"]),), 4, 1.0, "euler", "simple", 0, memory_gb=0.0)
    condition = conditioning()
    calibration = calibrate(patcher, [condition], condition, settings, folder, Progress(lambda *_: None, []))
    made = {}
    for row in JOB["rows"]:
        path = folder / f"{row}.safetensors".replace(" ", "_")
        try:
            if row in NATIVE:
                state = native_state(patcher, row)
            else:
                scheme = PRESETS[row]
                plain = scheme.weights.with_options(rounding=Rounding.NEAREST, search=False)
                built, _ = quantize(patcher, scheme.with_options(weights=plain), calibration, {}, lambda *_: None)
                layers = quantized_state(built)
                state = full_state(layers, float_state(built, set(layers), compute_dtype(patcher)))
            write_tensors(path, state, {METADATA: json.dumps({"version": VERSION})} if row in PRESETS else {})
            made[row] = {"file": str(path), "bytes": path.stat().st_size}
        except (KeyError, ValueError) as error:
            made[row] = {"absent": f"{type(error).__name__}: {error}"}
    return made


def native_state(patcher, row: str) -> dict:
    """The same layers that we round, in a format of the host's own."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    form, layout, options, stored = NATIVE[row]
    QUANT_ALGOS[form]
    layers, _, _ = select(patcher)
    if options.get("convrot"):
        # the widest rotation that the host's format accepts on every layer
        wide = next(order for order in (256, 64, 16) if all(m.in_features % order == 0 for m in layers.values()))
        options, stored = options | {"convrot_groupsize": wide}, {"convrot": True, "convrot_groupsize": wide}
    state = float_state(patcher, set(layers), compute_dtype(patcher))
    for name, load in weight_loaders(patcher, layers).items():
        weight = QuantizedTensor.from_float(load().to(compute_dtype(patcher)), layout, **options)
        state.update(weight.state_dict(f"{name}.weight"))
        config = json.dumps({"format": form, **stored}).encode()
        state[f"{name}.comfy_quant"] = torch.tensor(list(config), dtype=torch.uint8)
    return state


def time_row() -> dict:
    """Seconds to load, seconds of each step after the first, peak memory of this process and of the device."""
    started = time.perf_counter()
    if JOB["row"] in PRESETS:
        patcher = load_quantized(Path(JOB["file"]))
    elif JOB["row"] in NATIVE:
        patcher = comfy.sd.load_diffusion_model(JOB["file"], {"dtype": DTYPES[JOB["dtype"]]})
    else:
        patcher = load_float(DTYPES[JOB["row"]])
    if JOB["row"] in PRESETS or JOB["row"] in NATIVE:
        patcher.set_model_compute_dtype(DTYPES[JOB["dtype"]])
    comfy.model_management.load_models_gpu([patcher])
    loaded = time.perf_counter()
    stamps = []

    def stamp(*_) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    found = sample(patcher, JOB["steps"] + 1, stamp)
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "load_s": loaded - started,
        "first_step_s": stamps[0] - loaded,
        "step_s": [b - a for a, b in itertools.pairwise(stamps)],
        "peak_process_bytes": peak_rss(),
        "peak_device_bytes": device,
        "finite": bool(torch.isfinite(found).all()),
        "spread": float(found.std()),
        "latent": found.flatten()[:: max(found.numel() // 4096, 1)].tolist(),
    }


def peak_rss() -> int:
    """Bytes, pages of mapped files included; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(JOB.get("threads") or torch.get_num_threads())
    result = {"make": make, "convert": convert, "time": time_row}[JOB["do"]]()
    result["versions"] = {"torch": torch.__version__, "host": host_version()}
    device = comfy.model_management.get_torch_device()
    result["threads"] = torch.get_num_threads()
    result["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(json.dumps(result))


def host_version() -> str:
    return bind("host_version", HOST / "comfyui_version.py").__version__


main()
