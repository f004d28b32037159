"""Runs the PTX of a compiled kernel on a CPU, a program (CTA) at a time, and checks what a card would not.

    driver.pretend(89)          # Triton's driver from here on: what it compiles for a card of 8.9 is run here
    machine.run(program, ...)   # one launch

Every instruction does what PTX's manual says, all threads of a program at once. What a card does whenever it likes is
done as late as it may: asynchronous copies land when they are waited for, and memory that they go to is unreadable
until then. An access that is outside of every operand or misaligned, reading shared memory that nobody wrote, and
touching bytes that another warp touched since the last barrier are errors.

What it does not show: what ptxas makes of the PTX, and time.
"""

# each knows some instructions
from . import arithmetic, blackwell, engine, transfers, warpgroups, warps

__all__ = ["arithmetic", "blackwell", "engine", "transfers", "warpgroups", "warps"]
