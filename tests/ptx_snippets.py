"""Short kernels for tests of ptx/."""

import numpy as np
from ptx.machine import Machine, execute
from ptx.memory import Buffer, Global, Shared
from ptx.program import parse

MODULE = """
.visible .entry snippet({parameters})
.reqntid {threads}
{{
	.reg .pred 	%p<99>;
	.reg .b16 	%rs<99>;
	.reg .b32 	%r<999>;
	.reg .b64 	%rd<99>;
	mov.u32 	%r0, %tid.x;
	{body}
	ret;
}}
"""


def run(body: str, *operands: np.ndarray, threads: int = 32, shared: int = 1024, **registers: np.ndarray) -> Machine:
    """Runs a program of one CTA. %r0 is the thread; %rd0, %rd1, ... point to the operands. registers: name without its
    percent sign -> values, one per thread."""
    names = [f"snippet_param_{i}" for i in range(len(operands))]
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 {name}" for name in names)
    pointers = "".join(f"ld.param.b64 %rd{i}, [{name}];\n" for i, name in enumerate(names))
    program = parse(MODULE.format(parameters=parameters, threads=threads, body=pointers + body))
    buffers = [Buffer(x.ctypes.data, x.view(np.uint8).reshape(-1), f"operand {i}") for i, x in enumerate(operands)]
    given = dict(zip(names, (buffer.start for buffer in buffers), strict=True))
    machine = Machine(program, Global(buffers), Shared(shared), given, (0, 0, 0), (1, 1, 1))
    machine.registers |= {f"%{name}": np.resize(values, threads) for name, values in registers.items()}
    execute(machine)
    return machine
