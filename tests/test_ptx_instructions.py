"""What the emulated instructions compute, against other ways of computing it."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.engine import swizzled
from ptx.rounding import fused, to_half
from ptx_snippets import run

RANDOM = np.random.default_rng(0)
LANES = np.arange(32)


def bits(values) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


def floats(machine, name: str) -> np.ndarray:
    return machine.registers[name].view(np.float32)


def words() -> np.ndarray:
    return RANDOM.integers(0, 2**32, 32, np.uint32)


def nearest(exact: Fraction) -> np.float32:
    """The float closest to it, of two that with the even mantissa."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(side)) for side in (-np.inf, np.inf)] + [guess]
    return min(near, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.uint32)) & 1))


def test_fused_multiply_add_rounds_once():
    """Products of numbers of 13 bits often end in a tie, which a tiny addend breaks."""
    near = 1 + RANDOM.integers(0, 2**12, (3, 4000)).astype(np.float32) * np.float32(2**-12)
    scale = np.float32(2.0) ** RANDOM.integers(-30, 30, (3, 4000)).astype(np.float32)
    scale[2] *= RANDOM.choice(np.float32([2.0**-90, 1]), 4000)
    signs = RANDOM.choice(np.float32([-1, 1]), (3, 4000))
    a, b, c = (near * scale * signs).astype(np.float32)
    found = fused(a, b, c)
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert found.tolist() == [float(nearest(value)) for value in exact]
    # rounded twice, some are others
    assert not np.array_equal(found, (a.astype(np.float64) * b + c).astype(np.float32))


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves_are_rounded_as_torch_rounds_them(kind, dtype):
    values = RANDOM.integers(0, 2**32, 20000, np.uint32).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(dtype)
    found = torch.from_numpy(to_half(values, kind).astype(np.int16)).view(dtype)
    known = ~expected.isnan()
    assert torch.equal(found[known], expected[known])
    assert found[~known].isnan().all()


def test_floats_are_rounded_to_whole_ones():
    values = np.float32([-2.5, -0.75, 0.5, 1.5, 2.5, 7.25, 2**30, -np.inf])
    machine = run(
        "cvt.rpi.f32.f32 %r2, %r1; cvt.rmi.f32.f32 %r3, %r1; cvt.rni.f32.f32 %r4, %r1; cvt.rzi.f32.f32 %r5, %r1;",
        r1=bits(np.tile(values, 4)),
    )
    for register, whole in (("%r2", np.ceil), ("%r3", np.floor), ("%r4", np.round), ("%r5", np.trunc)):
        assert np.array_equal(floats(machine, register)[:8], whole(values))


def test_integers_wrap_shift_and_extend():
    a, b = words(), words()
    machine = run(
        "mad.lo.s32 %r3, %r1, %r2, -1; mad.wide.s32 %rd1, %r1, %r2, 7; mul.hi.u32 %r4, %r1, %r2; shl.b32 %r5, %r1, 40;"
        "shr.s32 %r6, %r1, 40; bfe.s32 %r7, %r1, 4, 8; cvt.s64.s32 %rd2, %r1; cvt.u64.u32 %rd3, %r1;"
        "min.s32 %r8, %r1, %r2;",
        r1=a,
        r2=b,
    )
    signed = [(int(x) ^ 2**31) - 2**31 for x in a], [(int(x) ^ 2**31) - 2**31 for x in b]
    pairs = list(zip(*signed, strict=True))
    assert machine.registers["%r3"].tolist() == [(x * y - 1) % 2**32 for x, y in pairs]
    assert machine.registers["%rd1"].tolist() == [(x * y + 7) % 2**64 for x, y in pairs]
    assert machine.registers["%r4"].tolist() == [int(x) * int(y) >> 32 for x, y in zip(a, b, strict=True)]
    assert not machine.registers["%r5"].any()
    assert machine.registers["%r6"].tolist() == [-(x < 0) % 2**32 for x, _ in pairs]
    assert machine.registers["%r7"].tolist() == [(((x >> 4 & 255) ^ 128) - 128) % 2**32 for x, _ in pairs]
    assert machine.registers["%rd2"].tolist() == [x % 2**64 for x, _ in pairs]
    assert machine.registers["%rd3"].tolist() == a.tolist()
    assert machine.registers["%r8"].tolist() == [min(pair) % 2**32 for pair in pairs]


@pytest.mark.parametrize("table", [0x96, 0xE8, 0x0F, 0x80])
def test_logic_by_table_and_permuted_bytes(table):
    a, b, c = words(), words(), words()
    machine = run(f"lop3.b32 %r4, %r1, %r2, %r3, {table}; prmt.b32 %r5, %r1, %r2, %r3;", r1=a, r2=b, r3=c)
    for x, y, z, joined, permuted in zip(a, b, c, machine.registers["%r4"], machine.registers["%r5"], strict=True):
        each = [(int(x) >> i & 1) << 2 | (int(y) >> i & 1) << 1 | (int(z) >> i & 1) for i in range(32)]
        assert int(joined) == sum((table >> entry & 1) << i for i, entry in enumerate(each))
        source = x.tobytes() + y.tobytes()
        nibbles = [int(z) >> 4 * i & 15 for i in range(4)]
        picked = [source[n & 7] if n < 8 else (255 if source[n & 7] > 127 else 0) for n in nibbles]
        assert int(permuted).to_bytes(4, "little") == bytes(picked)


def test_nan_counts_for_nothing_in_extremes_and_for_true_where_unordered():
    machine = run(
        "max.f32 %r3, %r1, %r2; min.NaN.f32 %r4, %r1, %r2; setp.neu.f32 %p1, %r1, %r1; setp.eq.f32 %p2, %r1, %r1;"
        "selp.b32 %r5, 1, 0, %p1; selp.b32 %r6, 1, 0, %p2;",
        r1=bits([np.nan, 1]),
        r2=bits([2, 3]),
    )
    assert floats(machine, "%r3")[:2].tolist() == [2, 3]
    assert np.isnan(floats(machine, "%r4")[0])
    assert floats(machine, "%r4")[1] == 1
    assert machine.registers["%r5"][:2].tolist() == [1, 0]
    assert machine.registers["%r6"][:2].tolist() == [0, 1]


def test_extremes_of_a_warp_keep_a_nan_only_where_they_say_so():
    values = RANDOM.normal(size=32).astype(np.float32)
    values[7] = np.nan
    machine = run("redux.sync.max.f32 %r2, %r1, -1; redux.sync.min.NaN.f32 %r3, %r1, -1;", r1=bits(values))
    assert (floats(machine, "%r2") == np.nanmax(values)).all()
    assert np.isnan(floats(machine, "%r3")).all()


def test_pairs_of_floats_in_one_register():
    a, b = RANDOM.normal(size=(2, 64)).astype(np.float32)
    machine = run(
        "mul.rn.f32x2 %rd3, %rd1, %rd2; mov.b64 {%r1, %r2}, %rd3;", rd1=a.view(np.uint64), rd2=b.view(np.uint64)
    )
    assert np.array_equal(floats(machine, "%r1"), (a * b)[::2])
    assert np.array_equal(floats(machine, "%r2"), (a * b)[1::2])


def test_threads_that_part_meet_again():
    """Lanes loop 1 to 4 times; those that stop early wait at the exchange, which then has all."""
    machine = run("""
        and.b32 %r1, %r0, 3;
        mov.b32 %r2, 0;
        setp.gt.u32 %p2, %r0, 15;
        @%p2 bra $ELSEWHERE;
        $AGAIN:
        add.s32 %r2, %r2, 1;
        setp.le.u32 %p1, %r2, %r1;
        @%p1 bra $AGAIN;
        $TOGETHER:
        shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;
        bra.uni $END;
        $ELSEWHERE:
        mov.b32 %r2, 100;
        bra.uni $TOGETHER;
        $END:
    """)
    own = np.where(LANES < 16, LANES % 4 + 1, 100)
    assert machine.registers["%r2"].tolist() == own.tolist()
    assert machine.registers["%r3"].tolist() == own[LANES ^ 1].tolist()


def fragment(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Four int8 of a row each, as one register."""
    return np.ascontiguousarray(matrix[rows[:, None], columns[:, None] + np.arange(4)]).view(np.uint32)[:, 0]


def test_product_of_small_matrices():
    a, b = RANDOM.integers(-128, 128, (16, 32), np.int8), RANDOM.integers(-128, 128, (8, 32), np.int8)
    given = {f"r{10 + i}": fragment(a, LANES // 4 + 8 * (i % 2), 4 * (LANES % 4) + 16 * (i // 2)) for i in range(4)}
    given |= {f"r{20 + i}": fragment(b, LANES // 4, 4 * (LANES % 4) + 16 * i) for i in range(2)}
    machine = run(
        "mov.b32 %r5, 7; mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1, %r2, %r3, %r4}, "
        "{%r10, %r11, %r12, %r13}, {%r20, %r21}, {%r5, %r5, %r5, %r5};",
        **given,
    )
    expected = a.astype(np.int32) @ b.T.astype(np.int32) + 7
    for i in range(4):
        rows, columns = LANES // 4 + 8 * (i // 2), 2 * (LANES % 4) + i % 2
        assert np.array_equal(machine.registers[f"%r{i + 1}"].view(np.int32), expected[rows, columns])


@pytest.mark.parametrize("way", ["", ".trans"])
def test_matrices_are_stored_as_they_are_loaded(way):
    values = [words() for _ in range(4)]
    machine = run(
        "shl.b32 %r5, %r0, 4; add.s32 %r5, %r5, 1024;"
        f"stmatrix.sync.aligned.m8n8.x4{way}.shared.b16 [%r5], {{%r1, %r2, %r3, %r4}};"
        f"ldmatrix.sync.aligned.m8n8.x4{way}.shared.b16 {{%r11, %r12, %r13, %r14}}, [%r5];",
        **{f"r{i + 1}": value for i, value in enumerate(values)},
    )
    for i, value in enumerate(values):
        assert np.array_equal(machine.registers[f"%r{i + 11}"], value)
    stored = machine.shared.data[:128].view(np.uint16).reshape(8, 8)
    matrix = values[0].view(np.uint16).reshape(8, 8)
    assert np.array_equal(stored, matrix if not way else matrix.T)


@pytest.mark.parametrize("span", [32, 64, 128])
def test_places_within_a_span_are_exchanged(span):
    """Twice is once, rows of 128 bytes stay, and eight rows of 16 bytes in one column fall on span / 16 places."""
    addresses = np.arange(1024)
    assert np.array_equal(swizzled(swizzled(addresses, span), span), addresses)
    assert np.array_equal(swizzled(addresses, span) // 128, addresses // 128)
    assert len(set((swizzled(np.arange(8) * 128, span) % 128).tolist())) == span // 16
