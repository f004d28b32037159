"""Launching a Triton kernel again, without Triton looking at every argument to find what it had compiled for them."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

# the Tritons of which it is known what they compile by; a newer one looks at every argument until it was checked
FIRST_CHECKED, LAST_CHECKED = (3, 4), (3, 9)
# a layer's row and fraction lie anywhere among those of all layers: kernels must not be compiled by where
GROUP_POINTERS = ["index_ptr", "fraction_ptr"]
INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True, eq=False)
class Launcher:
    """A kernel with the values of its constexprs, which stand last among its arguments, and Triton's options, for one
    device. repeats: what was compiled for operands of some kinds is launched for others of the same kinds."""

    kernel: Any
    constants: tuple[Any, ...]
    options: dict[str, Any]
    repeats: bool
    compiled: dict[tuple, Any] = field(default_factory=dict)

    def __call__(self, programs: int, *operands: Any) -> None:
        """Runs on the current device. operands: tensors, descriptors, numbers and None, in the kernel's order."""
        kinds = tuple([kind(operand) for operand in operands])
        compiled = self.compiled.get(kinds)
        if compiled is not None:
            compiled[(programs, 1, 1)](*operands, *self.constants)
            return
        compiled = self.kernel[(programs,)](*operands, *self.constants, **self.options)
        if self.repeats:
            self.compiled[kinds] = compiled


def launcher(kernel: Any, capability: int, **given: Any) -> Launcher:
    """given: the kernel's constexprs and Triton's options, in any order; capability as `capability_of` has it."""
    constants = [name for name in kernel.arg_names if name in given]
    if kernel.arg_names[len(kernel.arg_names) - len(constants) :] != constants:
        raise ValueError(f"{kernel.arg_names} do not end with {constants}")
    options = {name: value for name, value in given.items() if name not in constants}
    return Launcher(kernel, tuple(given[name] for name in constants), options, repeats(capability))


def kind(operand: Any) -> Any:
    """All of an operand that Triton compiles by on NVIDIA's cards; finer for numbers that it does not specialize on."""
    if operand is None:
        return None
    if isinstance(operand, Tensor):
        return operand.dtype, operand.data_ptr() % 16 == 0
    if type(operand) is int:
        return operand == 1, operand % 16 == 0, operand in INT32
    if type(operand) is float:
        return float
    # a tensor descriptor
    return operand.base.dtype, *operand.block_shape


def repeats(capability: int) -> bool:
    """Whether `kind` holds here: AMD's backend also looks at the size of a tensor, the interpreter compiles nothing."""
    return capability > 0 and checked()


@lru_cache(maxsize=1)
def checked() -> bool:
    from .version_triton import release

    return FIRST_CHECKED <= release() <= LAST_CHECKED
