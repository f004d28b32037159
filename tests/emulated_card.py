"""The Triton kernels' tests on a card that is not here: what Triton compiles for it runs on the CPU, see ptx/.

    DIT_QUANT_EMULATED_CARD=89 python -m pytest tests/kernels/test_int8_linear_triton.py

DIT_QUANT_EMULATED_SHARE: "2/7" keeps the tests 2, 9, 16, ... of those collected.
"""

import os

from benchmark_scripts import load

CARD = int(os.environ.get("DIT_QUANT_EMULATED_CARD", "0"))
# tests that launch kernels, and of no other card than this one
MODULES = (*load("card").LAUNCHING, "test_emulated_faults")


def attach() -> None:
    """Before anything of dit_quant.kernels is imported."""
    os.environ.pop("TRITON_INTERPRET", None)
    load("dry_launches").pretend(CARD)
    from ptx import driver

    driver.attach()


def shared(items: list) -> tuple[list, list]:
    """Tests of this run's share, and all others."""
    position, _, shares = os.environ.get("DIT_QUANT_EMULATED_SHARE", "0/1").partition("/")
    mine = set(range(int(position), len(items), int(shares)))
    return [item for i, item in enumerate(items) if i in mine], [item for i, item in enumerate(items) if i not in mine]
