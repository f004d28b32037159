"""Compiles Triton kernels for cards that are not here and reads off what they became.

In a process of its own, because TRITON_INTERPRET turns every kernel of a process into an interpreted one:

    results = compile_all([Compilation(name, module, kernel, signature, constexprs, 90, options), ...])

Nothing is run and no device is needed. `python tests/ahead_of_time.py --all [--capability 90]` compiles every shipped
configuration and prints a table.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmark_scripts import load

ROOT = Path(__file__).absolute().parent.parent
# bytes of shared memory that one program may have, and registers of one multiprocessor / of one thread
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
AMD_SHARED_LIMIT = 64 * 1024
CAPABILITIES = tuple(SHARED_LIMIT)
REGISTER_FILE = 65536
MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*")
# wgmma {accumulator}, {A in registers}, descriptor of B; a descriptor in second place is A in shared memory
REGISTER_OPERAND = re.compile(r"wgmma\.mma_async[^{;]*\{[^}]*\}\s*,\s*\{")


@dataclass(frozen=True)
class Compilation:
    """One kernel for one target.

    module, kernel: where the @triton.jit function is ("dit_quant.kernels.int8_linear.triton_impl", "_kernel").
    signature: argument -> Triton type, ":16" appended where a pointer or size is known to be divisible by 16
    ("*i8:16", "i32"). constexprs: argument -> JSON value; "tl.bfloat16" becomes that dtype, None an absent argument.
    capability: 80 to 120, or an AMD target such as "gfx942". options: num_warps, num_stages, ...
    """

    name: str
    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, object]
    capability: int | str
    options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Compiled:
    """What came out; `error` is set and the rest zero where nothing did.

    matrix: PTX matrix instruction -> count, such as "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32".
    register_operands: products whose left operand is in registers. permutes: byte permutations in the PTX.
    barriers: of all threads of a program, per step of the innermost loop that multiplies.
    registers per thread; spills: bytes of stack and local memory per thread; shared: bytes per program.
    """

    name: str
    capability: int | str
    matrix: dict[str, int] = field(default_factory=dict)
    register_operands: int = 0
    permutes: int = 0
    barriers: int = 0
    registers: int = 0
    spills: int = 0
    shared: int = 0
    warps: int = 0
    seconds: float = 0.0
    cached: bool = False
    cubin: str = ""
    error: str = ""

    def faults(self, expected: str) -> list[str]:
        """Why this must not ship; `expected`: regular expression that every matrix instruction has to match ("" for
        a kernel without any)."""
        if self.error:
            return [self.error]
        found = []
        if expected and not self.matrix:
            found.append("no matrix instruction")
        found += [f"{name} is not {expected}" for name in self.matrix if not re.search(expected or "$^", name)]
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if isinstance(self.capability, int) and self.registers * self.warps * 32 > REGISTER_FILE:
            found.append(f"{self.registers} registers x {self.warps} warps > {REGISTER_FILE}")
        limit = SHARED_LIMIT.get(self.capability) if isinstance(self.capability, int) else AMD_SHARED_LIMIT
        if limit is not None and self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory > {limit}")
        return found


def compile_all(
    requests: list[Compilation], cache: Path | None = None, timeout: float = 900, triton: Path | None = None
) -> list[Compiled]:
    """In as many subprocesses as there are cores.

    cache: Triton's cache folder, by default its usual one. triton: a folder with another Triton.
    """
    shares = max(1, min(os.cpu_count() or 1, len(requests)))
    results: list[Compiled] = [Compiled("", 0)] * len(requests)
    with ThreadPoolExecutor(shares) as pool:
        done = pool.map(lambda share: _compile_share(requests[share::shares], cache, timeout, triton), range(shares))
        for share, compiled in enumerate(done):
            results[share::shares] = compiled
    return results


def _compile_share(
    requests: list[Compilation], cache: Path | None, timeout: float, triton: Path | None
) -> list[Compiled]:
    run = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(request) for request in requests]),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=load("dry_launches").compiling(cache, triton),
    )
    if run.returncode:
        raise RuntimeError(f"compiling failed as a whole: {run.stderr[-4000:]}")
    return [Compiled(**result) for result in json.loads(run.stdout.splitlines()[-1])]


def compile_one(request: Compilation) -> Compiled:
    """In a process without TRITON_INTERPRET."""
    from triton import knobs

    hits: list[bool] = []
    knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
    start = time.perf_counter()
    try:
        compiled = _compile(request)
    except Exception as error:
        return Compiled(request.name, request.capability, error=f"{type(error).__name__}: {error}"[:2000])
    seconds = round(time.perf_counter() - start, 3)
    # Triton 3.4 does not tell
    cubin = str(getattr(compiled, "metadata_group", {}).get(f"{request.kernel}.cubin", ""))
    return read_off(
        request.name,
        request.capability,
        compiled.asm.get("ptx", compiled.asm.get("amdgcn", "")),
        compiled.asm.get("cubin", b""),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        seconds=seconds,
        cached=all(hits),
        cubin=cubin,
    )


def read_off(name: str, capability: int | str, assembly: str, binary: bytes, **known: Any) -> Compiled:
    """assembly, binary: PTX and the object made of it, or AMD's assembly alone; known: what the compiler told."""
    matrix = Counter(MATRIX.findall(assembly)) or Counter(re.findall(r"\bv_(?:mfma|wmma)\w+", assembly))
    registers, spills = _resources(binary) or _amd_resources(assembly)
    return Compiled(
        name,
        capability,
        matrix=dict(matrix),
        register_operands=len(REGISTER_OPERAND.findall(assembly)),
        permutes=len(re.findall(r"\bprmt\.b32\b", assembly)),
        barriers=len(re.findall(r"\bbar\.sync\b", main_loop(assembly))),
        registers=registers,
        spills=spills,
        **known,
    )


def main_loop(ptx: str) -> str:
    """The shortest part between a label and a branch back to it that has a matrix instruction; "" without one."""
    loops = []
    for label in re.finditer(r"^(\$L__BB\w+):", ptx, re.MULTILINE):
        back = re.search(rf"\bbra(?:\.uni)?\s+{re.escape(label[1])};", ptx[label.end() :])
        if back is not None:
            loops.append(ptx[label.end() : label.end() + back.end()])
    return min((loop for loop in loops if MATRIX.search(loop)), key=len, default="")


def _compile(request: Compilation):
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as triton_compile

    fn = getattr(importlib.import_module(request.module), request.kernel)
    constexprs = {
        name: getattr(tl, value[3:]) if isinstance(value, str) and value.startswith("tl.") else value
        for name, value in request.constexprs.items()
    }
    missing = set(fn.arg_names) - set(request.signature) - set(constexprs)
    unknown = (set(request.signature) | set(constexprs)) - set(fn.arg_names)
    if missing or unknown:
        raise TypeError(f"{request.kernel}: no type or value for {sorted(missing)}, no such argument {sorted(unknown)}")
    signature, attributes = {}, {}
    for position, name in enumerate(fn.arg_names):
        kind, _, divisor = ("constexpr", "", "") if name in constexprs else request.signature[name].partition(":")
        signature[name] = kind
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    if isinstance(request.capability, int):
        target = GPUTarget("cuda", request.capability, 32)
    else:
        target = GPUTarget("hip", request.capability, 64 if request.capability.startswith("gfx9") else 32)
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton_compile(source, target=target, options=request.options)


def nvidia_tool(name: str) -> Path:
    """ptxas, cuobjdump or nvdisasm as shipped with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / (name + (".exe" if os.name == "nt" else ""))


def _amd_resources(assembly: str) -> tuple[int, int]:
    values = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", assembly)}
    return values["vgpr_count"], 4 * values["vgpr_spill_count"]


def _resources(cubin: bytes) -> tuple[int, int] | None:
    """Registers and spilled bytes per thread, which the driver would read off the same object."""
    if not cubin:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [nvidia_tool("cuobjdump"), "--dump-resource-usage", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return int(values["REG"]), int(values["STACK"]) + int(values["LOCAL"])


def _bind_package() -> None:
    """`import dit_quant` in a checkout of any name; see tests/conftest.py."""
    if importlib.util.find_spec("dit_quant") is None:
        spec = importlib.util.spec_from_file_location(
            "dit_quant", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["dit_quant"] = importlib.util.module_from_spec(spec)


def _sweep(capabilities: list[int]) -> int:
    """Every compilation that a tests/*_compilations.py module lists; 1 if one of them must not ship."""
    bad = 0
    print(f"{'kernel':58} {'sm':>4} {'registers':>9} {'spills':>6} {'shared':>7} {'seconds':>8}  matrix instructions")
    for path in sorted(Path(__file__).parent.glob("*_compilations.py")):
        module = importlib.import_module(path.stem)
        for request, expected in module.compilations(all=True):
            if request.capability not in capabilities:
                continue
            result = compile_one(request)
            faults = result.faults(expected)
            bad += bool(faults)
            seconds = "cached" if result.cached else f"{result.seconds:.2f}"
            instructions = ", ".join(f"{count} {name}" for name, count in result.matrix.items())
            print(
                f"{result.name:58} {result.capability:>4} {result.registers:>9} {result.spills:>6} {result.shared:>7} "
                f"{seconds:>8}  {instructions} {'; '.join(faults)}",
                flush=True,
            )
    print(f"{bad} must not ship")
    return int(bad > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compile every shipped configuration and print a table")
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    _bind_package()
    if arguments.all:
        return _sweep(arguments.capability or list(CAPABILITIES))
    results = [asdict(compile_one(Compilation(**request))) for request in json.load(sys.stdin)]
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
