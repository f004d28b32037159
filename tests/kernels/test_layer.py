"""A layer in one call of the C: the bits of its two ops, and only where both of them would be C."""

import pytest
import torch
from dit_quant.kernels import dispatch, whole_layer
from dit_quant.kernels.int4_linear import native_impl as int4_native
from dit_quant.kernels.int8_linear import native_impl as int8_native
from dit_quant.kernels.native import layer as native_layer
from dit_quant.kernels.native.library import library
from dit_quant.kernels.quantize_activation import native_impl as quantizer
from dit_quant.kernels.quantize_along import native_impl as along

pytestmark = [
    pytest.mark.usefixtures("build", "poisoned_empty"),
    pytest.mark.skipif(isinstance(library(), str), reason=f"native: {library()}"),
]

# one token, a tile less one, a tile, more; more tiles than a thread's share; more codes than fit a chunk
SHAPES = [(1, 100, 33), (7, 64, 1), (11, 16, 32), (12, 3088, 33), (63, 256, 70), (900, 48, 65), (1100, 8192, 5)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def at(index=1, fraction=0.0):
    return {"index": torch.tensor([index]), "fraction": torch.tensor([fraction])}


def tables(M: int, K: int, N: int, *, R=0, bits=8, symmetric=False, static=False, hadamard=1, full=True) -> dict:
    """Keywords of `whole_layer`; full: with everything that may be absent."""
    random = torch.Generator().manual_seed(M + K + N)
    given: dict = {"hadamard": hadamard, "symmetric": symmetric, "column_scale": torch.rand(N, 1, generator=random)}
    if bits == 4:
        given["w"] = torch.randint(0, 256, (N, K // 2), generator=random).to(torch.uint8)
        given["levels"] = torch.randint(0, 256, (N, K // 16), generator=random).to(torch.uint8)
    else:
        given["w"] = torch.randint(-127, 128, (N, K), generator=random).to(torch.int8)
    if not symmetric:
        given["column_sum"] = torch.randint(-99, 99, (N,), generator=random).to(torch.int32)
    if static:
        given["static_scale"] = torch.tensor([0.5, 0.02, 0.03])
        given["static_zero"] = None if symmetric else torch.tensor([3.0, -40.0, 41.3])
    if full:
        given["shift"] = torch.randn(3, K, generator=random).half()
        given["smooth"] = (torch.rand(K, generator=random) + 0.5).half()
        given["bias"] = torch.randn(N, generator=random)
        given["correction"] = torch.randn(3, N, generator=random).half()
    if R:
        given["directions"] = (torch.randn(R, K, generator=random) / K**0.5).half()
        given["responses"] = torch.randn(R, N, generator=random).half()
    return given


def normal(M: int, K: int, dtype=torch.float32):
    return torch.randn(M, K, generator=torch.Generator().manual_seed(K)).to(dtype)


def apart(x, *, w, index, fraction, **given):
    """The two native ops, one after the other."""
    group = {"index": index, "fraction": fraction}
    names = ("shift", "smooth", "directions", "hadamard", "symmetric", "static_scale", "static_zero")
    first = {name: given.pop(name) for name in names if name in given}
    p = None
    if "directions" in first:
        codes, scale, zero, p = along.quantize_along(x, **first, **group)
    else:
        codes, scale, zero = quantizer.quantize_activation(x, **first, **group)
    linear = int4_native.int4_linear if "levels" in given else int8_native.int8_linear
    return linear(codes, w, row_scale=scale, row_zero=zero, coordinates=p, **given, **group, dtype=x.dtype)


def assert_bit_equal(x, given, **group):
    found = whole_layer(x, **given, **group)
    assert found is not None
    expected = apart(x, **given, **group)
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("R", [0, 3, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "K", "N"), SHAPES)
def test_one_call_has_the_bits_of_two(M, K, N, dtype, R):
    assert_bit_equal(normal(M, K, dtype), tables(M, K, N, R=R), **at(fraction=0.3))


@pytest.mark.parametrize("full", [True, False], ids=["all tables", "no tables"])
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("hadamard", [1, 16, 256])
def test_every_kind_of_layer(hadamard, bits, symmetric, static, full):
    given = tables(25, 512, 40, bits=bits, symmetric=symmetric, static=static, hadamard=hadamard, full=full)
    assert_bit_equal(normal(25, 512), given, **at(2))


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_bit_equal(normal(900, 64), tables(900, 64, 96, R=4, hadamard=64), **at())
    finally:
        torch.set_num_threads(before)


def test_rows_may_lie_anywhere():
    wide = normal(30, 200)
    given = tables(30, 64, 33, R=2)
    assert_bit_equal(wide[:, 17:81], given, **at())
    assert_bit_equal(wide[:, :30].T[:, :30].expand(30, 30), tables(30, 30, 33), **at())
    assert_bit_equal(wide[:1, :64].expand(30, 64), given, **at())


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 30), (30, 1, 1)])
def test_tokens_in_any_shape(shape):
    x, given = normal(30, 64), tables(30, 64, 33, R=2)
    expected = whole_layer(x, **given, **at())
    assert expected is not None
    found = whole_layer(x.reshape(*shape, 64), **given, **at())
    assert found is not None
    assert torch.equal(found, expected.reshape(*shape, 33))
    apart = x.reshape(*shape, 64).transpose(0, 1)
    found = whole_layer(apart, **given, **at())
    assert found is not None
    assert torch.equal(found, expected.reshape(*shape, 33).transpose(0, 1))


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tables_of_any_float_type(kind):
    given = tables(20, 64, 33)
    for name in ("shift", "smooth", "bias", "correction", "column_scale"):
        given[name] = given[name].half().to(kind)
    assert_bit_equal(normal(20, 64), given, **at(1, 0.3))
    assert_bit_equal(normal(20, 64), given, **at(2, 0.3))


@pytest.mark.parametrize("index", [-1, 3, 2**40])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shift", {}),
        ("static_scale", {"shift": None}),
        ("correction", {"shift": None, "static_scale": None, "static_zero": None}),
    ],
)
def test_a_group_that_a_table_does_not_have_is_an_error(name, change, index):
    given = tables(20, 64, 33, static=True) | change
    with pytest.raises(IndexError, match=f"timestep group {index} is not in {name}"):
        native_layer.layer(
            normal(20, 64),
            given.pop("w"),
            **({"levels": None, "directions": None, "responses": None} | given | at(index)),
        )


def test_what_is_not_finite_comes_out_as_from_two_calls():
    x = normal(20, 64)
    x[3, 5], x[15, 0] = torch.nan, torch.inf
    assert_bit_equal(x, tables(20, 64, 33), **at())
    assert_bit_equal(x, tables(20, 64, 33, R=2, symmetric=True), **at())


def test_only_where_both_would_be_native():
    x, given = normal(20, 64), tables(20, 64, 33) | at()
    assert whole_layer(x, **given, backend="native") is not None
    for backend in ("torch", "reference"):
        assert whole_layer(x, **given, backend=backend) is None
    assert whole_layer(x[:0], **given) is None
    assert whole_layer(x.double(), **given) is None


def test_both_ops_are_recorded(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.reset()
    whole_layer(normal(20, 64), **tables(20, 64, 33, R=2), **at())
    ran = {shape.op: choice.backend for shape, choice in dispatch.recorded().items()}
    assert ran == {"quantize_along": "native", "int8_linear": "native"}


def test_a_failure_leaves_it_to_the_two_ops(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no such instruction")

    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    x, given = normal(20, 64), tables(20, 64, 33) | at()
    monkeypatch.setattr("dit_quant.kernels.layer.layer", fails)
    assert whole_layer(x, **given) is None
    monkeypatch.setattr("dit_quant.kernels.layer.layer", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        whole_layer(x, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.zeros(33, 63, dtype=torch.int8)}, "a weight of 63 bytes a row does not fit tokens of K=64"),
        ({"column_sum": None}, "needs the weight's column sums"),
        ({"column_sum": torch.zeros(32, dtype=torch.int32)}, "column_sum has 32 entries, not 33"),
        ({"smooth": torch.ones(63)}, "smooth has 63 entries, not 64"),
        ({"shift": torch.ones(2, 63)}, "shift has 126 entries, not 128"),
        ({"shift": torch.ones(0, 64)}, "shift has no timestep groups"),
        ({"index": torch.tensor([0, 1])}, "index has 2 entries, not 1"),
        ({"hadamard": 256}, "K=64 is not divisible by the Hadamard block 256"),
        ({"responses": torch.zeros(2, 32, dtype=torch.float16)}, r"are not \[R, 64\], \[R, 33\]"),
        ({"responses": None}, "come together"),
        ({"directions": torch.zeros(2, 64)}, "directions and responses are fp16"),
    ],
    ids=str,
)
def test_what_would_be_read_past_its_end_is_an_error(change, message):
    given = tables(20, 64, 33, R=2) | at() | change
    with pytest.raises(ValueError, match=message):
        native_layer.layer(
            normal(20, 64), given.pop("w"), **({"static_scale": None, "static_zero": None, "levels": None} | given)
        )
