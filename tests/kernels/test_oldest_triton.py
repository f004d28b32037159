"""The oldest Triton that the kernels take compiles them too: later ones understand more of Python.

DIT_QUANT_OLDEST_TRITON: a folder with that version; `make oldest-triton` makes one, and `make test` then finds it.
"""

import os
from pathlib import Path

import pytest
from ahead_of_time import Compiled, compile_all
from benchmark_scripts import load
from dit_quant.kernels.tiles import TILES, family_of
from dit_quant.kernels.triton_device import OLDEST_TRITON
from linear_compilations import compilations as linears
from linear_compilations import int8_compilation
from quantizers_compilations import compilations as quantizers

FOLDER = Path(os.environ.get("DIT_QUANT_OLDEST_TRITON", ""))

pytestmark = pytest.mark.skipif(not FOLDER.name, reason="DIT_QUANT_OLDEST_TRITON is not set: make oldest-triton")
# every third: of each target and kernel some
REQUESTS = [request for request, _ in (*linears(), *quantizers()) if isinstance(request.capability, int)][::3]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[Compiled]:
    return compile_all(REQUESTS, cache=tmp_path_factory.mktemp("cache"), triton=FOLDER)


def test_it_is_that_version():
    (found,) = FOLDER.glob("triton-*.dist-info")
    assert found.name.startswith("triton-{}.{}.".format(*OLDEST_TRITON))


@pytest.mark.parametrize("position", range(len(REQUESTS)), ids=[f"{r.name} sm{r.capability}" for r in REQUESTS])
def test_it_compiles_what_ships(position, results):
    assert results[position].error == ""


def test_a_form_of_every_kernel_is_among_them():
    kernels = {r.kernel for r in REQUESTS}
    products = {"int8_linear_kernel", "int4_linear_kernel", "decode_weight"}
    assert kernels == {*products, "quantize_rows", "quantize_long_rows"}
    assert any(r.constexprs.get("FIND") for r in REQUESTS)
    assert any(r.constexprs.get("PARTS", 1) > 1 and not r.constexprs["EARLY"] for r in REQUESTS)


def test_the_largest_tiles_of_gaming_cards_do_not_spill(tmp_path):
    """Triton 3.4 to 3.6 count more registers than 3.9 does."""
    tiles = {capability: TILES["int8_linear", family_of(capability)][0] for capability in (80, 86, 89, 120)}
    requests = [int8_compilation(capability, tile) for capability, tile in tiles.items()]
    found = {result.capability: result.spills for result in compile_all(requests, cache=tmp_path, triton=FOLDER)}
    assert found == dict.fromkeys(tiles, 0)


@pytest.mark.parametrize("capability", [86, 90])
def test_it_takes_what_the_ops_launch(capability, tmp_path):
    """Operands in a tuple, absent ones in it, and on Hopper tensor descriptors."""
    dry = load("dry_launches")
    launches = [dry.Launch(preset, 4096, 3072, 9216) for preset in ("W8A8", "W8A8 static", "W4A8")]
    for kernels in dry.dry_launches(capability, launches, tmp_path, cache=tmp_path / "cache", triton=FOLDER):
        quantizer, *decoder, product = kernels
        assert quantizer.name == "quantize_rows"
        assert [kernel.name for kernel in decoder] in ([], ["decode_weight"])
        assert product.name in ("int8_linear_kernel", "int4_linear_kernel")
