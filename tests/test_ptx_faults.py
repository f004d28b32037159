"""What a card would do silently is an error of the emulated one."""

import numpy as np
import pytest
from ptx.memory import Fault
from ptx_snippets import run

X = np.arange(64, dtype=np.uint32)
# %r1: four bytes of shared memory for each thread; %r2: those of the thread 32 further
PLACES = "shl.b32 %r1, %r0, 2; add.s32 %r1, %r1, 1024; xor.b32 %r2, %r1, 128;"
COPY = "mad.wide.u32 %rd9, %r0, 16, %rd0; shl.b32 %r3, %r0, 4; add.s32 %r3, %r3, 1024;"
COPY += "cp.async.cg.shared.global [ %r3 + 0 ], [ %rd9 + 0 ], 0x10; cp.async.commit_group;"


def test_exchange_over_a_barrier_is_none():
    machine = run(PLACES + "st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r4, [%r2];", threads=64)
    assert machine.registers["%r4"].tolist() == [thread ^ 32 for thread in range(64)]


def test_memory_of_the_own_warp_needs_no_barrier():
    run(PLACES + "xor.b32 %r3, %r1, 4; st.shared.b32 [%r1], %r0; ld.shared.b32 %r4, [%r3];", threads=64)


def test_the_same_value_may_be_written_twice():
    run(
        "mov.b32 %r1, 1024; mov.b32 %r2, 5; st.shared.b32 [%r1], %r2; bar.sync 0; ld.shared.b32 %r3, [%r1];", threads=64
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("st.shared.b32 [%r1], %r0; ld.shared.b32 %r4, [%r2];", "another warp wrote since the last barrier"),
        (
            "st.shared.b32 [%r1], %r0; bar.sync 0; ld.shared.b32 %r4, [%r2]; st.shared.b32 [%r1], %r0;",
            "another warp read since the last barrier",
        ),
        ("mov.b32 %r1, 1024; st.shared.b32 [%r1], %r0;", "different values to the same bytes of shared memory"),
        ("ld.shared.b32 %r4, [%r1];", "nobody wrote"),
        ("ld.shared.b32 %r4, [%r1+1024];", "1024 bytes has no byte"),
        ("st.shared.b32 [%r1+2], %r0;", "not divisible by 4"),
        ("st.shared.b32 [%r1+-1024], %r0;", "has no byte"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra $END; bar.sync 0; $END:", "others that never come"),
        ("vote.sync.any.pred %p1, %p2, -1;", "vote.sync.any.pred is not known here"),
    ],
)
def test_shared_memory_and_barriers(body, words):
    with pytest.raises(Fault, match=words):
        run(PLACES + body, threads=64)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("ld.global.b32 %r4, [%rd0+256];", "256 bytes from the start of operand 0 of 256 bytes"),
        ("ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd0+244];", "divisible by 16"),
        ("st.global.b32 [%rd0+-4], %r0;", "outside of every operand"),
        ("st.global.b32 [%rd0], %r0;", "different values to the same bytes of operand 0"),
    ],
)
def test_global_memory(body, words):
    memory = np.zeros(68, np.uint32)
    start = next(i for i in range(4) if memory[i:].ctypes.data % 16 == 0)
    with pytest.raises(Fault, match=words):
        run(body, memory[start : start + 64])


def test_threads_that_are_masked_off_read_nothing():
    machine = run(
        "setp.lt.u32 %p1, %r0, 16; mad.wide.u32 %rd1, %r0, 16, %rd0; mov.b32 %r4, 9; @%p1 ld.global.b32 %r4, [%rd1];", X
    )
    assert machine.registers["%r4"].tolist() == [*range(0, 64, 4), *[9] * 16]


def test_copies_land_when_they_are_waited_for():
    wide = np.arange(128, dtype=np.uint32)
    machine = run(COPY + "cp.async.wait_group 0; ld.shared.b32 %r4, [%r3];", wide)
    assert machine.registers["%r4"].tolist() == list(range(0, 128, 4))


@pytest.mark.parametrize(
    ("body", "threads", "words"),
    [
        ("ld.shared.b32 %r4, [%r3];", 32, "while a copy to it is under way"),
        ("cp.async.wait_group 1; ld.shared.b32 %r4, [%r3];", 32, "while a copy to it is under way"),
        ("cp.async.wait_group 0; xor.b32 %r5, %r3, 512; ld.shared.b32 %r4, [%r5];", 64, "another warp wrote"),
        ("st.shared.b32 [%r3], %r0;", 32, "writes shared memory while a copy"),
    ],
)
def test_copies_that_are_not_waited_for(body, threads, words):
    with pytest.raises(Fault, match=words):
        run(COPY + body, np.zeros(256, np.uint32), threads=threads)


def test_a_copy_to_what_others_still_read():
    with pytest.raises(Fault, match="another warp read since"):
        run(
            "mov.b32 %r5, 0; shl.b32 %r3, %r0, 4; add.s32 %r3, %r3, 1024; st.shared.b32 [%r3], %r5; bar.sync 0;"
            "xor.b32 %r6, %r3, 512; ld.shared.b32 %r4, [%r6];" + COPY,
            np.zeros(256, np.uint32),
            threads=64,
        )


def test_a_barrier_in_memory_that_nothing_completes():
    body = "mov.b32 %r1, 1024; setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1; mov.b32 %r2, 0;"
    with pytest.raises(Fault, match="nothing will complete"):
        run(body + "mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r1], %r2;")


# B [8, 32] from byte 0 on, its rows within 128 bytes of each other: a stride of 1024 bytes between groups of eight
PRODUCT = """
    mov.b32 %r1, 16843009; shl.b32 %r2, %r0, 5; add.s32 %r2, %r2, 1024; st.shared.b32 [%r2], %r1;
    {fill} {fence} bar.sync 0;
    mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0; mov.pred %p1, -1;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {{%r10,%r11,%r12,%r13}}, {{%r1,%r1,%r1,%r1}}, %rd5, %p1, 1, 1;
    wgmma.commit_group.sync.aligned;
    {before}
    wgmma.wait_group.sync.aligned 0;
    add.s32 %r20, %r13, 1;
"""
FILL = "".join(f"st.shared.b32 [%r2+{4 * i}], %r1;" for i in range(1, 8))
DESCRIPTOR = np.uint64(1 << 62 | 64 << 32 | 1024 >> 4)


def product(fence="fence.proxy.async.shared::cta;", before=""):
    body = PRODUCT.format(fill=FILL, fence=fence, before=before)
    return run(body, threads=128, shared=4096, rd5=DESCRIPTOR)


def test_a_product_of_ones_counts_them():
    assert product().registers["%r20"].tolist() == [33] * 128


def test_products_that_are_not_waited_for_or_not_fenced():
    with pytest.raises(Fault, match="reads %r13, which a product is still writing"):
        product(before="add.s32 %r21, %r13, 1;")
    with pytest.raises(Fault, match="without a fence"):
        product(fence="")
    with pytest.raises(Fault, match="changed while a product was still reading it"):
        product(before="mov.b32 %r22, 0; st.shared.b32 [%r2], %r22;")
