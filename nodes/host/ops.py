"""The host's layer classes, with a Linear that knows our layout."""

import logging

import comfy.ops
import torch

from ...quant_core.checkpoint import CONFIG_KEY, SUFFIXES, layer_from_tensors, layer_tensors
from ...quant_core.checkpoint import is_ours as config_is_ours
from ...quant_core.files import DamagedFile
from ...quant_core.linear import dequantize, quant_linear
from ...quant_core.timesteps import TimestepState
from .layout import is_ours, unwrap, wrap

log = logging.getLogger("dit_quant")
TABLE_NAMES = frozenset((*SUFFIXES.values(), CONFIG_KEY)) - {"weight"}


def make_operations(dtype: torch.dtype):
    """An operations class for `custom_operations`; layers without our tables behave as the host's own."""
    base = comfy.ops.mixed_precision_ops({}, dtype)

    class DiTQuantOps(base):
        class Linear(base.Linear):
            """Integer forward for our layout; everything else is the host's mixed-precision Linear."""

            timestep_state: TimestepState | None = None
            timestep_slot = 0
            backend = "auto"
            _warned = False

            def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
                config = state_dict.get(f"{prefix}{CONFIG_KEY}")
                if config is None or not config_is_ours(config):
                    return super()._load_from_state_dict(
                        state_dict, prefix, local_metadata, strict, missing, unexpected, errors
                    )
                name = prefix.rstrip(".")
                layer = layer_from_tensors(name, state_dict, (self.out_features, self.in_features))
                for suffix in (*SUFFIXES.values(), CONFIG_KEY):
                    state_dict.pop(f"{prefix}{suffix}", None)
                dtype = self.factory_kwargs["dtype"]
                self.weight = torch.nn.Parameter(wrap(layer, dtype), requires_grad=False)
                self.layout_type = self.weight._layout_cls
                bias = state_dict.pop(f"{prefix}bias", None)
                if bias is not None:
                    if tuple(bias.shape) != (self.out_features,) or not bias.is_floating_point():
                        raise DamagedFile(f"{name}.bias: {list(bias.shape)} {bias.dtype}, not [{self.out_features}]")
                    self.bias = torch.nn.Parameter(bias.to(dtype=dtype), requires_grad=False)
                elif self.bias is not None:
                    missing.append(f"{prefix}bias")
                return None

            def state_dict(self, *args, destination=None, prefix="", **kwargs):
                if not is_ours(self.weight):
                    return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
                found = destination if destination is not None else {}
                found.update(layer_tensors(prefix.rstrip("."), unwrap(self.weight)))
                if self.bias is not None:
                    found[f"{prefix}bias"] = self.bias
                return found

            def __getattr__(self, name):
                # the host asks a layer for every name in its state_dict, when models are merged for instance
                if name in TABLE_NAMES and is_ours(self._parameters.get("weight")):
                    tables = layer_tensors("", unwrap(self._parameters["weight"]))
                    if f".{name}" in tables:
                        return tables[f".{name}"]
                return super().__getattr__(name)

            def convert_weight(self, weight, inplace=False, **kwargs):
                if not is_ours(weight):
                    return super().convert_weight(weight, inplace, **kwargs)
                # the host would work LoRAs in in fp16: all codes would be rounded for what fp16 loses, and unlike in
                # a file that is saved
                return dequantize(unwrap(weight))

            def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
                if not is_ours(self.weight):
                    return super().set_weight(weight, inplace_update, seed, return_weight, **kwargs)
                dtype = self.weight.dtype
                rounded = self.weight.requantize_from_float(weight, stochastic_rounding=seed).to(dtype)
                if return_weight:
                    return rounded
                self.weight = torch.nn.Parameter(rounded, requires_grad=False)
                return None

            def forward(self, input, *args, **kwargs):
                if not is_ours(self.weight):
                    return super().forward(input, *args, **kwargs)
                comfy.ops.run_every_op()
                weight, bias, stream = comfy.ops.cast_bias_weight(
                    self,
                    input=None,
                    dtype=self.weight.dtype,
                    device=input.device,
                    bias_dtype=input.dtype,
                    offloadable=True,
                    compute_dtype=torch.float32,
                    want_requant=True,
                )
                if is_ours(weight):
                    if self.timestep_state is None:
                        raise RuntimeError("a quantized layer was built without its timestep state; reload the model")
                    group = self.timestep_state.select(self.timestep_slot)
                    y = quant_linear(input, unwrap(weight), bias, *group, self.backend)
                else:
                    self._warn_once()
                    y = torch.nn.functional.linear(input, weight.to(input.dtype), bias)
                comfy.ops.uncast_bias_weight(self, weight, bias, stream)
                return y

            def _warn_once(self):
                if not DiTQuantOps.Linear._warned:
                    DiTQuantOps.Linear._warned = True
                    log.warning(
                        "a LoRA on an offloaded quantized layer is applied in floating point, which is slower; "
                        "apply the LoRA before Quantize DiT, or free memory so that the layer stays loaded"
                    )

    return DiTQuantOps
