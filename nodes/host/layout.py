"""Our layout of the host's QuantizedTensor: the logical weight is the original W, tables travel with the codes."""

import dataclasses
from dataclasses import dataclass

import torch
from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
from comfy_kitchen.tensor.base import BaseLayoutParams

from ...quant_core.linear import TENSOR_FIELDS, QuantizedLinear, dequantize
from ...quant_core.requantize import requantize
from ...quant_core.timesteps import SINGLE_GROUP, TimestepGroups

LAYOUT = "DiTQuantLayout"
TABLES = tuple(name for name in TENSOR_FIELDS if name not in ("qdata", "scale"))


class DiTQuantLayout(QuantizedLayout):
    """int8 or packed 4-bit codes with shift, scale, rotation and correction. See QuantizedLinear."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        levels: torch.Tensor | None = None
        column_sum: torch.Tensor | None = None
        smooth: torch.Tensor | None = None
        shift: torch.Tensor | None = None
        correction: torch.Tensor | None = None
        directions: torch.Tensor | None = None
        responses: torch.Tensor | None = None
        static_scale: torch.Tensor | None = None
        static_zero: torch.Tensor | None = None
        hadamard: int = 1
        symmetric: bool = True
        groups: TimestepGroups = SINGLE_GROUP

        def _tensor_fields(self) -> list[str]:
            return [name for name in ("scale", *TABLES) if getattr(self, name) is not None]

    @classmethod
    def quantize(cls, tensor, like: QuantizedLinear | None = None, stochastic_rounding: int | None = 0, **_):
        """Only ever re-rounds a changed weight: a first rounding needs a calibration, see the Quantize DiT node."""
        if like is None:
            raise ValueError("DiTQuantLayout cannot round a weight without its calibration; use Quantize DiT")
        # the host brings a changed weight to the card before the layer
        like = like.map(lambda table: table.to(tensor.device))
        layer = requantize(tensor.detach(), like, int(stochastic_rounding or 0))
        wrapped = wrap(layer, tensor.dtype)
        return wrapped._qdata, wrapped._params

    @classmethod
    def dequantize(cls, qdata, params):
        return dequantize(_core(qdata, params)).to(params.orig_dtype)

    @classmethod
    def requantize_kwargs(cls, qtensor) -> dict:
        return {"like": unwrap(qtensor)}

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return (qtensor._qdata, qtensor._params.scale)

    @classmethod
    def state_dict_tensors(cls, qdata, params) -> dict:
        return {"" if name == "qdata" else f"_{name}": value for name, value in _core(qdata, params).tensors().items()}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        return False


register_layout_class(LAYOUT, DiTQuantLayout)


def _core(qdata: torch.Tensor, params) -> QuantizedLinear:
    fields = {name: getattr(params, name) for name in ("scale", *TABLES, "hadamard", "symmetric", "groups")}
    return QuantizedLinear(qdata=qdata, **fields)


def unwrap(tensor: QuantizedTensor) -> QuantizedLinear:
    """The host's tensor -> our layer; no copies."""
    return _core(tensor._qdata, tensor._params)


def wrap(layer: QuantizedLinear, dtype: torch.dtype) -> QuantizedTensor:
    """Our layer -> the host's tensor, logically a [N, K] weight of `dtype`; no copies."""
    fields = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name != "qdata"}
    params = DiTQuantLayout.Params(orig_dtype=dtype, orig_shape=layer.features, **fields)
    return QuantizedTensor(layer.qdata, LAYOUT, params)


def is_ours(weight: object) -> bool:
    """Whether a parameter holds one of our layers."""
    return isinstance(weight, QuantizedTensor) and getattr(weight, "_layout_cls", None) == LAYOUT
