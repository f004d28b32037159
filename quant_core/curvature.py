"""What an error in a layer's output costs the model's output: second moments of gradients, from random probes.

For a model output v and r ~ N(0, 1), the gradient g of r . v / rms(v) in a layer's output has E[g gᵀ] = JᵀJ, J the
Jacobian of v in units of its size: the curvature of the squared error of v at 0 (a sketch as in YAQA, arXiv 2505.22988,
tokens taken as independent). A few model calls are enough: every token of each is a sample.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .feedback import largest_divisor
from .observers import GOLDEN

# channels whose errors answer for one another; more of them cost memory and time and bring nothing
CURVATURE_BLOCK = 256
# one call in so many is probed: each costs as much as two or three calls more
PROBE_EVERY = 14
# multiples of irrational numbers spread evenly, whatever number of prompts and calls there is
ROOT_OF_TWO = 2**0.5


def is_probed(prompt: int, call: int, every: int = PROBE_EVERY) -> bool:
    """Whether a call of a prompt, both counted from 0, is one of the 1 in `every` that are probed; the first one is."""
    return (prompt * ROOT_OF_TWO + call * GOLDEN) % 1 < 1 / every


def probe_loss(output: Tensor, seed: int) -> Tensor:
    """r . v / rms(v) of every sample v of output [B, ...], summed; r is normal and belongs to the seed."""
    r = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.device)
    v = output.float()
    size = v.detach().flatten(1).square().mean(dim=1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (v * r / size.view(-1, *[1] * (v.ndim - 1))).sum()


class CurvatureCollector:
    """Sums of g gᵀ over tokens, per layer in diagonal blocks [P, c, c] fp32 on the CPU; shapes: (P, c) of each.

    features: N of every layer; block: widest c. Only calls that go through `probe` are measured.
    """

    def __init__(self, features: Mapping[str, int], block: int = CURVATURE_BLOCK, every: int = PROBE_EVERY):
        self.every = every
        widths = {N: largest_divisor(N, block) for N in features.values()}
        self.shapes = {name: (N // widths[N], widths[N]) for name, N in features.items()}
        self.moments: dict[str, Tensor] = {}
        self.probes = 0
        self.failure = ""
        self._prompt = self._call = 0
        self._probing = False

    def at_prompt(self, index: int) -> None:
        """Announces the next prompt: which of its calls are probed does not depend on the prompts before."""
        self._prompt, self._call = index, 0

    def due(self) -> bool:
        """Counts a call; whether it is to go through `probe`."""
        call, self._call = self._call, self._call + 1
        return not self.failure and is_probed(self._prompt, call, self.every)

    def give_up(self, reason: str) -> None:
        """Forgets everything and probes no more: half of the layers measured would be worth little."""
        self.failure = reason
        self.moments, self.probes = {}, 0

    def note(self) -> str:
        """For the report: what was measured, or why it was not and what that means."""
        if self.failure:
            return f"curvature not measured ({self.failure}): plain GPTQ is used, at some loss"
        return f"curvature measured in {self.probes} calls"

    @contextmanager
    def attached(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks the layers' outputs; the hooks are gone afterwards, whatever happens."""

        def hook(name: str):
            def after(module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
                if not self._probing or not torch.is_grad_enabled():
                    return None
                if not y.requires_grad:  # the first layer on its way: nothing before it asks for a gradient
                    y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
                y.register_hook(lambda grad: self.record(name, grad))
                return y

            return after

        handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def probe(self, call: Callable[[], Tensor]) -> Tensor:
        """Runs the model by call() under autograd and records gradients at the attached layers -> its output.

        call must take nothing that was made in inference mode: autograd cannot keep it.
        """
        with torch.inference_mode(False), torch.enable_grad():
            self._probing = True
            try:
                output = call()
                if output.requires_grad:
                    probe_loss(output, self._prompt * 1_000_003 + self._call).backward()
                    self.probes += 1
            finally:
                self._probing = False
        return output.detach()

    def record(self, name: str, grad: Tensor) -> None:
        """grad [..., N] in a layer's output. One that is not finite (a gradient beyond fp16) is left out."""
        blocks = grad.detach().flatten(0, -2).float().unflatten(1, self.shapes[name]).transpose(0, 1)  # [P, M, c]
        moment = (blocks.transpose(1, 2) @ blocks).cpu()
        if not bool(torch.isfinite(moment).all()):
            return
        if name in self.moments:
            self.moments[name] += moment
        else:
            self.moments[name] = moment

    @property
    def nbytes(self) -> int:
        return sum(moment.nbytes for moment in self.moments.values())
