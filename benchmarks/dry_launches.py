"""Launches a layer's Triton kernels for a card that is not here: everything but running them.

Triton gets a driver that names the card and no more. So the ops choose their tiles and prepare their arguments as on
it, and Triton compiles what they ask for; the results hold nothing. In a process of its own:

    kernels = dry_launches(89, [Launch("W8A8", M=4096, K=3072, N=9216)], folder, cache)
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMESTEP_GROUPS = 8


@dataclass(frozen=True)
class Launch:
    """A layer of a preset on x [M, K] of `dtype`, N out-features; `fused`: instead, a quantizer fused with what stands
    before it ("adaln", "gelu" or "swiglu"), of the preset's settings."""

    preset: str
    M: int
    K: int
    N: int
    dtype: str = "bfloat16"
    fused: str = ""


@dataclass(frozen=True)
class Kernel:
    """What a launch compiled. ptx, cubin: files; shared: bytes per program; seconds include finding it in a cache."""

    name: str
    ptx: str
    cubin: str
    warps: int
    shared: int
    seconds: float
    cached: bool


def dry_launches(
    capability: int, launches: list[Launch], folder: Path, cache: Path | None = None, triton: Path | None = None
) -> list[list[Kernel]]:
    """Per launch its kernels, in one new process; their files go to `folder`.

    cache: Triton's cache folder, by default its usual one. triton: a folder with another Triton. Raises RuntimeError
    with the end of what the process wrote when a launch failed.
    """
    job = {"capability": capability, "launches": [asdict(launch) for launch in launches], "folder": str(folder)}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=compiling(cache, triton),
    )
    if done.returncode:
        raise RuntimeError(f"capability {capability}: {done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return [[Kernel(**kernel) for kernel in kernels] for kernels in found]


def compiling(cache: Path | None, triton: Path | None) -> dict[str, str]:
    """The environment of a process that compiles, with another cache or Triton where these are named."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment


class Idle:
    """What Triton launches a compiled kernel by: here nothing happens."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *given: Any) -> None:
        pass


class Loader:
    """Takes compiled kernels of any size; each gets another handle."""

    def __init__(self) -> None:
        self.loaded = 0

    def load_binary(self, *given: Any) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, threads of the largest program."""
        self.loaded += 1
        return self.loaded, self.loaded, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20}


class Driver:
    """What Triton asks of a driver. A kernel that is launched returns at once."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)
        self.utils = Loader()
        self.launcher_cls = Idle

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record(folder: Path) -> list[Kernel]:
    """From here on launches compile only; returns the list that they are added to."""
    from dit_quant.kernels import launcher
    from triton import knobs
    from triton.runtime.jit import JITFunction

    # every launch is Triton's, that it is heard of
    launcher.repeats = lambda capability: False

    found: list[Kernel] = []
    hits: list[bool] = []
    knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    run = JITFunction.run

    def dry(self, *args: Any, grid: Any, warmup: bool, **options: Any):
        hits.clear()
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        seconds = time.perf_counter() - start
        files = {}
        for kind in ("ptx", "cubin"):
            content = kernel.asm[kind]
            files[kind] = folder / f"{os.getpid()}-{len(found)}.{kind}"
            files[kind].write_bytes(content if isinstance(content, bytes) else content.encode())
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        paths = str(files["ptx"]), str(files["cubin"])
        # without an event Triton knew the kernel from this process
        found.append(Kernel(self.__name__, *paths, warps, shared, round(seconds, 3), all(hits)))
        return kernel

    JITFunction.run = dry
    return found


def pretend(capability: int) -> None:
    """Tensors of the CPU count as this card's. Before anything else of the pack is imported."""
    from dit_quant.kernels import triton_device
    from triton.runtime import driver

    driver.set_active(Driver(capability))
    triton_device.capability_of = lambda device: capability
    refusal = triton_device.device_refusal
    triton_device.device_refusal = lambda device: triton_device.too_old() if device.type == "cpu" else refusal(device)


def launch(case: Launch) -> None:
    import torch
    from dit_quant import kernels
    from dit_quant.quant_core.linear import quant_linear, quantizer

    layer = empty_layer(case)
    index, fraction = torch.tensor([TIMESTEP_GROUPS // 2]), torch.tensor([0.0])
    x = torch.zeros(case.M, case.K, dtype=getattr(torch, case.dtype))
    if not case.fused:
        bias = torch.zeros(case.N, dtype=x.dtype)
        quant_linear(x, layer, bias, index, fraction, "triton")
        return
    settings = quantizer(layer) | {"index": index, "fraction": fraction, "backend": "triton"}
    if case.fused == "adaln":
        modulation = torch.zeros(1, case.K, dtype=x.dtype)
        kernels.adaln_quantize(x[None], modulation_scale=modulation, modulation_shift=modulation, **settings)
    elif case.fused == "gelu":
        kernels.gelu_quantize(x, approximate="tanh", **settings)
    else:
        kernels.swiglu_quantize(x, x, **settings)


def empty_layer(case: Launch):
    """The layer with the tensors that its preset has, none of which says anything."""
    import torch
    from dit_quant.quant_core.linear import QuantizedLinear
    from dit_quant.quant_core.schemes import PRESETS, group_size_for, hadamard_for

    scheme, T, N, K = PRESETS[case.preset], TIMESTEP_GROUPS, case.N, case.K
    half = {"dtype": torch.float16}
    tensors = {"shift": torch.zeros(T, K, **half), "smooth": torch.ones(K, **half)}
    tensors["correction"] = torch.zeros(T, N, **half)
    if scheme.weights.bits == 8:
        tensors["qdata"] = torch.zeros(N, K, dtype=torch.int8)
    else:
        tensors["qdata"] = torch.zeros(N, K // 2, dtype=torch.uint8)
        groups = K // (group_size_for(K, scheme.weights.group_size) or K)
        tensors["levels"] = torch.zeros(N, groups, dtype=torch.uint8)
    if scheme.directions:
        tensors["directions"] = torch.zeros(scheme.directions, K, **half)
        tensors["responses"] = torch.zeros(scheme.directions, N, **half)
    if not scheme.activations.symmetric:
        tensors["column_sum"] = torch.zeros(N, dtype=torch.int32)
    if not scheme.activations.dynamic:
        tensors["static_scale"] = torch.ones(T)
    return QuantizedLinear(
        scale=torch.ones(N, 1),
        hadamard=hadamard_for(K, scheme.hadamard),
        symmetric=scheme.activations.symmetric,
        **tensors,
    )


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    job = json.load(sys.stdin)
    pretend(job["capability"])
    found, results = record(Path(job["folder"])), []
    import torch
    from dit_quant.kernels import dispatch

    with torch.inference_mode():
        for case in job["launches"]:
            before = len(found)
            launch(Launch(**case))
            # another backend takes over where a kernel does not compile
            if failed := [choice for choice in dispatch.recorded().values() if choice.backend != "triton"]:
                raise RuntimeError(f"{case}: {failed[0]}")
            results.append([asdict(kernel) for kernel in found[before:]])
    print(json.dumps(results))


if __name__ == "__main__":
    main()
