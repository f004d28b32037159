"""torch.cuda over card.cpp, as far as a host asks: one card of compute capability 8.6, whose work is done at once.

No kernel can be launched on it: Triton finds no driver, and comfy-kitchen's compiled kernels are left out.
"""

import importlib.util
import os
import sys
import types

import torch

CAPABILITY = (8, 6)


def load_card() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("torch_card", os.environ["DIT_QUANT_TORCH_CARD"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["torch_card"] = module
    return module


card = load_card()
PROPERTIES = types.SimpleNamespace(
    name="emulated card",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=card.memory(),
    multi_processor_count=28,
    max_threads_per_multi_processor=1536,
    shared_memory_per_multiprocessor=102400,
    shared_memory_per_block_optin=101376,
    regs_per_multiprocessor=65536,
    warp_size=32,
    L2_cache_size=3 << 20,
    gcnArchName="",
)


class Context:
    """A device or a stream that is current already."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Stream(Context):
    device, cuda_stream = torch.device("cuda", 0), 0

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        pass

    def query(self):
        return True


class Event:
    def __init__(self, *_, **__):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 1.0


def constant(value):
    return lambda *_, **__: value


def memory_stats(*_):
    in_use = card.in_use()
    return {f"{name}_bytes.all.current": in_use for name in ("active", "reserved", "allocated")}


STREAM = Stream()
CUDART = types.SimpleNamespace(
    cudaHostRegister=constant(0), cudaHostUnregister=constant(0), cudaGetLastError=constant(0)
)
NAMES = {
    "_lazy_init": constant(None),
    "init": constant(None),
    "is_initialized": constant(True),
    "is_available": constant(True),
    "_is_compiled": constant(True),
    "device_count": constant(1),
    "current_device": constant(0),
    "set_device": constant(None),
    "get_device_properties": constant(PROPERTIES),
    "get_device_name": constant(PROPERTIES.name),
    "get_device_capability": constant(CAPABILITY),
    "mem_get_info": lambda *_: (card.memory() - card.in_use(), card.memory()),
    "memory_stats": memory_stats,
    "memory_allocated": lambda *_: card.in_use(),
    "memory_reserved": lambda *_: card.in_use(),
    "max_memory_allocated": lambda *_: card.in_use(),
    "reset_peak_memory_stats": constant(None),
    "memory_summary": constant(PROPERTIES.name),
    "synchronize": constant(None),
    "empty_cache": constant(None),
    "ipc_collect": constant(None),
    "is_bf16_supported": constant(True),
    "is_current_stream_capturing": constant(False),
    "get_allocator_backend": constant("native"),
    "Stream": Stream,
    "Event": Event,
    "current_stream": constant(STREAM),
    "default_stream": constant(STREAM),
    "stream": Context,
    "device": Context,
    "cudart": constant(CUDART),
    "manual_seed": constant(None),
    "manual_seed_all": constant(None),
    "seed_all": constant(None),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": constant(None),
}
for name, value in NAMES.items():
    setattr(torch.cuda, name, value)
torch.version.cuda = "13.0"
torch._C._cuda_getCurrentRawStream = constant(0)
torch._C._cuda_getDeviceCount = constant(1)
torch._C._cuda_isCurrentStreamCapturing = constant(False)


class Shim(types.ModuleType):
    """In place of a module that loads what was compiled for another torch: decorators that change nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return False if name.startswith("_IS_") else lambda function=None, *_, **__: function


for name in ("torchvision._meta_registrations", "torchaudio._extension", "torchaudio._extension.utils"):
    sys.modules[name] = Shim(name)


class WithoutKernels:
    """Finds everything but comfy-kitchen's compiled kernels."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "comfy_kitchen.backends.cuda._C":
            raise ImportError("an emulated card runs no compiled kernels")


sys.meta_path.insert(0, WithoutKernels)
