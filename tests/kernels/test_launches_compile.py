"""Every preset's layers launched for every target, through the ops and with their own arguments, all but the last step.

The other compilations list arguments by hand. Here the ops prepare them as on the card.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from ahead_of_time import CAPABILITIES, nvidia_tool, read_off
from benchmark_scripts import load
from dit_quant.kernels.tiles import bucket_of, decodes_first
from linear_compilations import INT8

if shutil.which(nvidia_tool("cuobjdump")) is None:
    pytest.skip("this build of Triton has no compiler for NVIDIA cards", allow_module_level=True)

dry = load("dry_launches")
FUSED = "adaln", "gelu", "swiglu"
PRESETS = "W8A8", "W8A8 fast", "W8A8 static", "W4A8"
# wide layers with many tokens, of fp32 too; one whose N the largest tile does not take
LAYERS = (
    *(dry.Launch(preset, 4096, 3072, 9216) for preset in PRESETS),
    dry.Launch("W8A8 fast", 4096, 3072, 9216, "float32"),
    # as many tokens for which no card decodes the weight first
    dry.Launch("W4A8", 4096, 1536, 1536),
    dry.Launch("W8A8", 63, 1152, 1160),
    dry.Launch("W4A8", 63, 1152, 1160),
    # no divisor of the tile's steps: an odd K, and a row that is no multiple of a word
    dry.Launch("W8A8", 7, 100, 33),
    # rows at any address, several in a program
    dry.Launch("W8A8", 7, 1160, 48),
    # as long as registers hold on one card, longer than on another
    dry.Launch("W8A8", 256, 15360, 3072),
)
CASES = (*LAYERS, *(dry.Launch("W4A8", 256, 3072, 1, fused=name) for name in FUSED))
EXPECTED = {"int8_linear_kernel": INT8, "int4_linear_kernel": INT8}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """(capability, case) -> kernels. In Triton's own cache, so that only a changed kernel is compiled again."""
    folder = tmp_path_factory.mktemp("kernels")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda capability: dry.dry_launches(capability, CASES, folder), CAPABILITIES)
        return {
            (capability, case): kernels
            for capability, launched in zip(CAPABILITIES, found, strict=True)
            for case, kernels in zip(CASES, launched, strict=True)
        }


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.fused or case.preset} K{case.K} {case.dtype}")
def test_what_an_op_launches_compiles_within_the_cards_limits(capability, case, results):
    kernels = results[capability, case]
    assert kernels
    for kernel in kernels:
        ptx, binary = Path(kernel.ptx).read_text(), Path(kernel.cubin).read_bytes()
        known = {"warps": kernel.warps, "shared": kernel.shared}
        assert read_off(kernel.name, capability, ptx, binary, **known).faults(EXPECTED.get(kernel.name, "")) == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_layer_is_a_quantizer_and_a_product(capability, results):
    for case in LAYERS:
        names = [kernel.name for kernel in results[capability, case]]
        if case.preset != "W4A8":
            products = ["int8_linear_kernel"]
        elif decodes_first(capability, bucket_of(case.M), case.N, case.K):
            products = ["decode_weight", "int8_linear_kernel"]
        else:
            products = ["int4_linear_kernel"]
        assert names[-len(products) :] == products
        assert names[: -len(products)] in (["quantize_rows"], ["coordinates_kernel", "quantize_long_rows"])


def test_what_another_backend_would_run_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)capability 90: .*float64 is not float32"):
        dry.dry_launches(90, [dry.Launch("W8A8 fast", 16, 64, 64, "float64")], tmp_path)


def test_a_kernel_that_does_not_compile_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)capability 90: .*no such preset"):
        dry.dry_launches(90, [dry.Launch("no such preset", 1, 64, 64)], tmp_path)
