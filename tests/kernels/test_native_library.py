"""Compiling and loading the C sources: what is kept, what is refused, and how that is said."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dit_quant.kernels import dispatch, user_cache
from dit_quant.kernels.backends import Shape
from dit_quant.kernels.int8_linear.native_impl import int8_linear
from dit_quant.kernels.native import build, library
from host_location import ROOT

CPU = Shape("int8_linear", torch.device("cpu"), torch.float32, 64, 64, 64)
HAS_COMPILER = any(map(shutil.which, build.COMPILERS))
runs = pytest.mark.skipif(isinstance(library.library(), str), reason=f"native: {library.library()}")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """An empty cache, and no choice or library that other tests left or will find."""
    monkeypatch.setenv(user_cache.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """What this machine's compiler makes of the sources."""
    path = tmp_path_factory.mktemp("once") / "library.so"
    build.compile_to(str(path), (*library.OPTIONS, *(() if library.amx_refusal() else library.AMX_OPTIONS)))
    return path


@pytest.fixture
def copies(once, monkeypatch) -> list[str]:
    """Compiling takes no time; the paths that were compiled to."""
    calls = []

    def compile_to(path, options):
        calls.append(path)
        shutil.copyfile(once, path)

    monkeypatch.setattr(build, "compile_to", compile_to)
    return calls


def forget():
    library.library.cache_clear()
    build.of_this_process.cache_clear()
    dispatch.reset()


def fake_compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_machine_with_the_instructions_and_a_compiler_runs_it():
    """Otherwise every other test here would be skipped in silence."""
    if library.unsupported() is None and HAS_COMPILER:
        assert isinstance(library.library(), library.Library)


@runs
@pytest.mark.usefixtures("copies")
def test_compiled_once(monkeypatch, tmp_path):
    library.library()
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("native-")
    library.library.cache_clear()
    monkeypatch.setattr(build, "compile_to", lambda *given: pytest.fail("compiled again"))
    assert isinstance(library.library(), library.Library)


@runs
@pytest.mark.usefixtures("copies")
def test_no_compiler_is_needed_once_compiled(monkeypatch):
    library.library()
    library.library.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert isinstance(library.library(), library.Library)


@runs
@pytest.mark.usefixtures("copies")
def test_a_changed_source_is_compiled_afresh(monkeypatch, tmp_path):
    copies = tmp_path / "sources"
    copies.mkdir()
    for name in (*build.SOURCES, *build.HEADERS):
        shutil.copy(build.FOLDER / name, copies)
    monkeypatch.setattr(build, "FOLDER", copies)
    first = library.built()
    (copies / "lanes.h").write_text((copies / "lanes.h").read_text() + "// changed\n")
    assert library.built() != first


@runs
@pytest.mark.usefixtures("copies")
def test_what_another_user_wrote_is_not_loaded(monkeypatch, tmp_path):
    path = library.built()
    assert build.kept(path.parent, path.stem.rpartition("-")[0]) == path
    real = Path.stat
    # of the file, then of its folder
    for foreign in (path, path.parent):

        def stat(self, *, foreign=foreign, **options):
            facts = real(self, **options)
            return os.stat_result((*facts[:4], 4711, *facts[5:10])) if self == foreign else facts

        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", stat)
            calls = []
            patch.setattr(build, "compile_to", lambda name, options, calls=calls: calls.append(name))
            assert library.built() != path or foreign == path
            assert len(calls) == 1
            assert calls[0].startswith(str(path.parent)) == (foreign == path)


@runs
@pytest.mark.usefixtures("copies")
def test_a_folder_that_everybody_may_write_to_is_not_used(tmp_path, caplog):
    """Somebody could put a library there between its compilation and its loading."""
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    path = library.built()
    assert path.parent != folder
    assert "is not kept for another time" in caplog.text
    assert not list(folder.iterdir())
    # once per process
    assert library.built() == path


@runs
@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("size", [0, 1000, 20000])
def test_a_file_that_was_cut_off_is_compiled_anew(size):
    """Loading it would end the process."""
    path = library.built()
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert library.built() == path
    assert len(path.read_bytes()) == len(whole)


@runs
@pytest.mark.usefixtures("copies")
def test_a_file_that_cannot_be_loaded_is_compiled_anew():
    path = library.built()
    path.write_bytes(bytes(path.stat().st_size))
    assert isinstance(library.library(), library.Library)


@runs
@pytest.mark.usefixtures("copies")
def test_a_relative_cache_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(user_cache.CACHE, ".")
    assert isinstance(library.library(), library.Library)
    assert list(tmp_path.glob("native-*.so"))


@runs
@pytest.mark.usefixtures("copies")
def test_a_user_without_a_home(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in (user_cache.CACHE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(user_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert isinstance(library.library(), library.Library)
    assert list(tmp_path.glob(f"dit_quant-{os.getuid()}/native-*.so"))


@runs
def test_a_home_where_nothing_may_be_executed(copies, monkeypatch, tmp_path, caplog):
    real = ctypes.CDLL

    def mounted_noexec(name, **options):
        if name is not None and name.startswith(str(tmp_path)):
            raise OSError("failed to map segment from shared object")
        return real(name, **options)

    monkeypatch.setattr(library.ctypes, "CDLL", mounted_noexec)
    assert isinstance(library.library(), library.Library)
    assert [Path(path).parent == tmp_path / "cache" for path in copies] == [True, False]
    assert f"{tmp_path / 'cache'} has one that cannot be loaded" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


@runs
def test_threads_that_meet_at_the_first_call_compile_once(copies):
    with ThreadPoolExecutor(2) as pool:
        found = [job.result() for job in [pool.submit(library.library) for _ in range(2)]]
    assert all(isinstance(each, library.Library) for each in found)
    assert len(copies) == 1


@runs
def test_amx_is_left_out_whatever_the_compiler_knows(monkeypatch, tmp_path):
    """CC may say -march=native; the machine's registers may be refused all the same."""
    real = next(filter(None, map(shutil.which, build.COMPILERS)))
    monkeypatch.setenv("CC", f"{real} -mamx-tile -mamx-int8")
    monkeypatch.setattr(library, "amx_refusal", lambda: "Linux refuses the registers of AMX")
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("no objdump")
    try:
        path = library.built()
    except RuntimeError as error:
        pytest.skip(str(error))
    code = subprocess.run([objdump, "-d", str(path)], capture_output=True, text=True, check=True).stdout
    assert "vpdpbusd" in code
    assert "tdpb" not in code


@runs
@pytest.mark.usefixtures("copies")
def test_another_compiler_is_another_library(monkeypatch):
    first = library.built()
    real = next(filter(None, map(shutil.which, build.COMPILERS)))
    monkeypatch.setenv("CC", f"{real} -g0")
    assert library.built() != first


@pytest.mark.skipif(library.unsupported() is not None, reason=str(library.unsupported()))
def test_no_compiler_is_a_reason_and_torch_runs(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    choice = dispatch.plan(CPU)
    assert choice.backend == "torch"
    assert dict(choice.refusals)["native"].startswith("no C compiler found (cc, gcc, clang)")


@pytest.mark.skipif(library.unsupported() is not None, reason=str(library.unsupported()))
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo note >&2; echo 'x.c:1: error: unknown option -mavx512vnni' >&2; exit 1", "error: unknown option"),
        ("exit 3", "failed: no message"),
        ('while [ "$1" != -o ]; do shift; done; echo "not a library" > "$2"', "invalid ELF header"),
        ("printf 'error: \\344\\n' >&2; exit 1", "error: "),
        ("sleep 60", "did not finish within 1 s"),
    ],
    ids=["complains", "silent", "writes nonsense", "in another encoding", "hangs"],
)
def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(monkeypatch, tmp_path, script, reason):
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "broken-cc", script))
    if script.startswith("sleep"):
        monkeypatch.setattr(build, "TIMEOUT", 1)
    choice = dispatch.plan(CPU)
    assert choice.backend == "torch"
    found = dict(choice.refusals)["native"]
    assert reason in found or "file too short" in found
    assert not list((tmp_path / "cache").glob("tmp*"))


@pytest.mark.skipif(library.unsupported() is not None, reason=str(library.unsupported()))
def test_a_compiler_that_is_no_command_is_a_reason(monkeypatch):
    monkeypatch.setenv("CC", "gcc 'x")
    assert dict(dispatch.plan(CPU).refusals)["native"].startswith("CC=gcc 'x is no command")


@runs
def test_the_compiler_of_the_environment_comes_first(monkeypatch, tmp_path):
    log = tmp_path / "log"
    real = next(filter(None, map(shutil.which, build.COMPILERS)))
    script = f'echo "$1" > {log}; shift; exec {real} "$@"'
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "my-cc", script) + " --marker")
    assert isinstance(library.library(), library.Library)
    assert log.read_text().strip() == "--marker"


@runs
def test_a_compiler_that_does_not_know_amx_does_without_it_and_says_so(monkeypatch, tmp_path, caplog):
    real = next(filter(None, map(shutil.which, build.COMPILERS)))
    script = f'case "$*" in *amx*) echo "error: unrecognized option -mamx-tile" >&2; exit 1;; esac; exec {real} "$@"'
    monkeypatch.setenv("CC", fake_compiler(tmp_path / "old-cc", script))
    monkeypatch.setattr(library, "amx_refusal", lambda: None)
    monkeypatch.setattr(library, "cpu_flags", lambda: {*library.CPU_FLAGS, *library.AMX_FLAGS})
    assert isinstance(library.library(), library.Library)
    assert "do without AMX" in caplog.text
    assert "unrecognized option" in caplog.text


@runs
@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("flags", [(), library.AMX_FLAGS], ids=["without AMX", "with AMX"])
def test_registers_that_are_refused_are_said_where_there_are_any(monkeypatch, caplog, flags):
    monkeypatch.setattr(library, "cpu_flags", lambda: {*library.CPU_FLAGS, *flags})
    monkeypatch.setattr(library, "amx_refusal", lambda: "Linux refuses the registers of AMX: No space left on device")
    assert isinstance(library.library(), library.Library)
    assert ("No space left" in caplog.text) == bool(flags)


@pytest.mark.parametrize("flag", library.AMX_FLAGS)
def test_why_amx_is_not_used(monkeypatch, flag):
    monkeypatch.setattr(library, "cpu_flags", lambda: {*library.CPU_FLAGS, *library.AMX_FLAGS} - {flag})
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    assert library.amx_refusal() == f"this CPU has no {flag}"


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
@pytest.mark.parametrize(
    ("limit", "refused"),
    [("AVX512_CORE_BF16", True), ("avx512_core_vnni", True), ("AVX512_CORE_AMX", False), ("ALL", False), ("", False)],
)
def test_what_switches_amx_off_for_torch_does_so_here(monkeypatch, limit, refused):
    monkeypatch.setattr(library, "cpu_flags", lambda: {*library.CPU_FLAGS, *library.AMX_FLAGS})
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert (f"ONEDNN_MAX_CPU_ISA={limit.upper()}" in (library.amx_refusal() or "")) == refused
    # the older name, where the newer says nothing
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert "DNNL_MAX_CPU_ISA=AVX2 switches it off" in (library.amx_refusal() or "")


@pytest.mark.skipif(sys.platform != "linux", reason="a system call of Linux")
def test_registers_that_linux_refuses_are_not_used(monkeypatch):
    monkeypatch.setattr(library, "cpu_flags", lambda: {*library.CPU_FLAGS, *library.AMX_FLAGS})
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(library, "ASK_FOR_AMX", (158, -1, 0))
    assert library.amx_refusal() == "Linux refuses the registers of AMX: Invalid argument"


@runs
@pytest.mark.usefixtures("copies")
def test_onednn_finds_its_own_tiles():
    """Both it and the C configure the registers of AMX, for whole threads."""
    x, w = torch.randn(64, 256), torch.randn(96, 256)
    codes = torch.randint(-127, 128, (64, 256), dtype=torch.int8)
    where = {"index": torch.tensor([0]), "fraction": torch.tensor([0.0])}
    unit = {"row_scale": torch.ones(64, 1), "column_scale": torch.ones(64, 1)} | where

    def theirs() -> torch.Tensor:
        return torch.nn.functional.linear(x.bfloat16(), w.bfloat16())

    def ours() -> torch.Tensor:
        return int8_linear(codes, codes, **unit)

    first = theirs(), torch._int_mm(codes, codes.T), ours()
    for _ in range(3):
        for found, expected in zip((theirs(), torch._int_mm(codes, codes.T), ours()), first, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("flag", library.CPU_FLAGS)
def test_missing_instructions_are_named(monkeypatch, flag):
    monkeypatch.setattr(library, "cpu_flags", lambda: {*library.CPU_FLAGS} - {flag})
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    assert library.library() == f"this CPU has no {flag}"


@pytest.mark.parametrize(("system", "machine"), [("win32", "AMD64"), ("darwin", "arm64"), ("linux", "aarch64")])
def test_other_machines_are_named(monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(library.platform, "machine", lambda: machine)
    assert library.library() == f"written for Linux on x86_64, not {system} on {machine}"


def test_other_devices_and_types_are_refused():
    assert library.refusal(torch.device("cuda"), torch.float32) == "runs on CPU only"
    assert library.refusal(torch.device("cpu"), torch.float64) == "no torch.float64"


@runs
@pytest.mark.usefixtures("copies")
def test_a_cache_that_cannot_be_written_is_replaced_for_the_process(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert isinstance(library.library(), library.Library)
    assert user_cache.user_cache().is_file()


@runs
@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("op", ["quantize_activation", "int8_linear", "int4_linear"])
def test_every_float_type_is_taken(op):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.plan(replace(CPU, op=op, dtype=dtype)).backend == "native"
    assert dispatch.plan(replace(CPU, op=op, dtype=torch.float64)).backend == "torch"


def test_rotations_that_it_does_not_know_are_refused():
    choice = dispatch.plan(replace(CPU, op="quantize_activation", hadamard=1024))
    assert dict(choice.refusals)["native"] == "no rotation in blocks of 1024"


def test_sources_are_part_of_an_installed_pack():
    """Not found by looking for __init__.py; without them an installed pack would be slower in silence."""
    tomllib = pytest.importorskip("tomllib")
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = data["dit_quant.kernels.native"]
    for name in (*build.SOURCES, *build.HEADERS):
        assert any(Path(name).match(pattern) for pattern in patterns)


def test_importing_the_kernels_compiles_nothing(tmp_path):
    """The first call does."""
    code = "import dit_quant.kernels, dit_quant.kernels.int8_linear.native_impl"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {user_cache.CACHE: str(tmp_path / "new")})
    assert not (tmp_path / "new").exists()


@runs
@pytest.mark.usefixtures("copies")
@pytest.mark.parametrize("wrong", ["a", "w", "bias", "column_scale"])
def test_an_operand_on_another_device_is_an_error_not_a_crash(wrong):
    codes = torch.zeros(7, 64, dtype=torch.int8)
    given = {"a": codes, "w": codes, "bias": torch.zeros(7), "column_scale": torch.ones(7, 1)}
    given[wrong] = given[wrong].to("meta")
    where = {"index": torch.tensor([0]), "fraction": torch.tensor([0.0])}
    with pytest.raises(ValueError, match="one is on meta"):
        int8_linear(given.pop("a"), given.pop("w"), row_scale=torch.ones(7, 1), **given, **where)


@runs
@pytest.mark.usefixtures("copies")
def test_no_tokens_are_no_error():
    where = {"index": torch.tensor([0]), "fraction": torch.tensor([0.0])}
    codes = torch.zeros(7, 64, dtype=torch.int8)
    y = int8_linear(codes[:0], codes, row_scale=torch.ones(0, 1), column_scale=torch.ones(7, 1), **where)
    assert y.shape == (0, 7)
