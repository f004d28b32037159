"""The linear layers of published DiTs, the numbers of tokens at which they are timed, and beside what."""

from dataclasses import dataclass

CPU_TOKENS = (1024, 4096)
CUDA_TOKENS = (256, 1024, 4096, 16384, 32768)
# a CPU runs small models only
CPU_WIDTHS = (1152, 4608)
# on a GPU: how fast a quantizer could be
COPY = "copy of the bytes that a quantizer moves"


@dataclass(frozen=True)
class Layer:
    """K in-features, N out-features."""

    model: str
    name: str
    K: int
    N: int


LAYERS = (
    Layer("PixArt", "qkv", 1152, 3456),
    Layer("PixArt", "attention projection", 1152, 1152),
    Layer("PixArt", "fc1", 1152, 4608),
    Layer("PixArt", "fc2", 4608, 1152),
    Layer("SD3.5-M", "qkv", 1536, 4608),
    Layer("SD3.5-M", "attention projection", 1536, 1536),
    Layer("SD3.5-M", "fc1", 1536, 6144),
    Layer("SD3.5-M", "fc2", 6144, 1536),
    Layer("FLUX double", "qkv", 3072, 9216),
    Layer("FLUX double", "attention projection", 3072, 3072),
    Layer("FLUX double", "fc1", 3072, 12288),
    Layer("FLUX double", "fc2", 12288, 3072),
    Layer("FLUX single", "linear1", 3072, 21504),
    Layer("FLUX single", "linear2", 15360, 3072),
    Layer("Wan 14B", "attention", 5120, 5120),
    Layer("Wan 14B", "fc1", 5120, 13824),
    Layer("Wan 14B", "fc2", 13824, 5120),
    Layer("Z-Image", "qkv", 3840, 11520),
    Layer("Z-Image", "w1", 3840, 10240),
    Layer("Z-Image", "w2", 10240, 3840),
)
QUICK = {"cpu": ("PixArt", "attention projection"), "cuda": ("FLUX double", "fc1")}


def cases(device: str, quick: bool, models: str = "") -> list[tuple[Layer, int]]:
    """(layer, tokens) to time. models: only those whose name contains this."""
    layers = [layer for layer in LAYERS if models.lower() in layer.model.lower()]
    if quick:
        layers = [layer for layer in layers if (layer.model, layer.name) == QUICK[device]]
        return [(layer, 1024 if device == "cpu" else 4096) for layer in layers]
    if device == "cpu":
        low, high = CPU_WIDTHS
        layers = [layer for layer in layers if low <= min(layer.K, layer.N) and max(layer.K, layer.N) <= high]
    return [(layer, M) for layer in layers for M in (CPU_TOKENS if device == "cpu" else CUDA_TOKENS)]
