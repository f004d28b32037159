"""A quantizer as torch and the dispatcher see it: what quantize_activation and its fused relatives share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import Key, bucket
from .registration import NAMESPACE, schema

# argument -> type, in the order of the schema; the backend comes last
QUANTIZER = {
    "index": "Tensor",
    "fraction": "Tensor",
    "shift": "Tensor?",
    "smooth": "Tensor?",
    "hadamard": "int",
    "symmetric": "bool",
    "static_scale": "Tensor?",
    "static_zero": "Tensor?",
}
# a schema has no optional result: an empty zero stands for none, [1, 1] for one value for all tokens
RESULTS = "(Tensor, Tensor, Tensor)"


@dataclass(frozen=True)
class QuantizerOp:
    """operands, prologue: name -> type of what the op takes by position and by name before QUANTIZER; shape:
    operands -> (M, K) of the codes."""

    name: str
    operands: dict[str, str]
    shape: Callable[..., tuple[int, ...]]
    prologue: dict[str, str]

    def key(
        self,
        x: Tensor,
        shape: tuple[int, ...],
        hadamard: int,
        symmetric: bool,
        static_scale: Tensor | None,
        static_zero: Tensor | None,
        backend: str,
    ) -> Key:
        """What the dispatcher chooses by; shape: (M, K) of the codes."""
        M, K = shape
        static, zeroless = static_scale is not None, not has_zero(symmetric, static_scale, static_zero)
        return self.name, x.device, x.dtype, bucket(M), K, None, None, hadamard, zeroless, static, backend

    def traced(self, *given) -> tuple[Tensor, Tensor, Tensor | None]:
        """The registered op, for torch.compile; `given` in the order of the schema."""
        codes, scale, zero = getattr(getattr(torch.ops, NAMESPACE), self.name)(*given)
        # symmetric, static_scale, static_zero, backend
        M, with_zero = codes.shape[0], has_zero(*given[-4:-1])
        return codes, scale.expand(M, 1), zero.expand(M, 1) if with_zero else None

    def registered(self, function: Callable) -> tuple[str, Callable, Callable]:
        """schema, function and fake, for `register`; function: the public one, with the reference's keywords."""
        count, names = len(self.operands), (*self.prologue, *QUANTIZER, "backend")

        def real(*given):
            named = dict(zip(names, given[count:], strict=True))
            codes, scale, zero = function(*given[:count], **named)
            if named["static_scale"] is not None:
                # one value for all tokens, whichever strides the backend gave its [M, 1]; any value for no tokens
                scale, zero = one_of(scale), None if zero is None else one_of(zero)
            # torch ops keep the strides of a transposed x
            return codes.contiguous(), scale, scale.new_empty(0) if zero is None else zero

        def fake(*given):
            named, x = dict(zip(names, given[count:], strict=True)), given[0]
            M, K = self.shape(*given[:count])
            rows = 1 if named["static_scale"] is not None else M
            scale = x.new_empty((rows, 1), dtype=torch.float32)
            with_zero = has_zero(named["symmetric"], named["static_scale"], named["static_zero"])
            return x.new_empty((M, K), dtype=torch.int8), scale, scale.new_empty((rows, 1) if with_zero else 0)

        arguments = {**self.operands, **self.prologue, **QUANTIZER, "backend": "str"}
        return schema(arguments, RESULTS), real, fake


def has_zero(symmetric: bool, static_scale: Tensor | None, static_zero: Tensor | None) -> bool:
    return not symmetric if static_scale is None else static_zero is not None


def one_of(values: Tensor) -> Tensor:
    """[M, 1], all the same -> [1, 1] of its own."""
    return (values[0] if len(values) else values.new_ones(1)).reshape(1, 1)
