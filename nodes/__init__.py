"""The ComfyUI side: thin node classes over quant_core. The only code that imports the host."""

from comfy_api.latest import ComfyExtension, io

from .calibrate import CalibrateDiT
from .demo import DecodeEmoji, EmojiPrompts, LoadEmojiDiT
from .files import LoadQuantizedDiT, SaveQuantizedDiT
from .group import GroupTimesteps
from .host import paths
from .quantize import QuantizeDiT


class DiTQuantExtension(ComfyExtension):
    """Registers the nodes and the folder of calibration caches."""

    async def on_load(self) -> None:
        paths.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            CalibrateDiT,
            GroupTimesteps,
            QuantizeDiT,
            SaveQuantizedDiT,
            LoadQuantizedDiT,
            EmojiPrompts,
            LoadEmojiDiT,
            DecodeEmoji,
        ]
