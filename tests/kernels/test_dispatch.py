"""The choice of a backend: order, overrides, refusals, failures at launch, and what is remembered of them."""

import importlib.util
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from dit_quant.kernels import backends, dispatch, quantize_activation
from dit_quant.kernels.backends import Implementation, Shape
from dit_quant.kernels.dispatch import Choice
from host_location import ROOT

CUDA = Shape("int8_linear", torch.device("cuda", 0), torch.bfloat16, 4096, 3072, 3072)
CPU = replace(CUDA, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choices of other tests, no wish of the machine's; ours are forgotten too."""
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    dispatch.reset()
    yield
    dispatch.reset()


class Fakes:
    """Backends that return their own name, refuse for `refusals`, and raise `errors`; calls are kept."""

    def __init__(self):
        self.refusals: dict[str, str] = {}
        self.errors: dict[str, Exception] = {}
        self.calls: list[str] = []

    def load(self, op: str, backend: str):
        def function(*args, **kwargs):
            self.calls.append(backend)
            if backend in self.errors:
                raise self.errors[backend]
            return backend

        return Implementation(function, lambda shape: self.refusals.get(backend))


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes()
    monkeypatch.setattr(dispatch, "load", fakes.load)
    return fakes


def run(shape: Shape, backend: str = "auto"):
    return dispatch.run(dispatch._key(shape, backend), "x")


def test_order_by_device(fakes):
    assert dispatch.plan(CUDA) == Choice("int8_linear", "triton")
    assert dispatch.plan(CPU) == Choice("int8_linear", "native")
    fakes.refusals["native"] = "no C compiler found"
    reason = (("native", "no C compiler found"),)
    dispatch.reset()
    assert dispatch.plan(CPU) == Choice("int8_linear", "torch", reason)
    assert dispatch.plan(replace(CPU, device=torch.device("mps"))) == Choice("int8_linear", "torch", reason)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_refusals_are_kept_in_order(fakes, count):
    names = backends.order(CUDA.device)
    fakes.refusals = {name: f"{name} cannot" for name in names[:count]}
    assert dispatch.plan(CUDA) == Choice("int8_linear", names[count], tuple(fakes.refusals.items()))


def test_everybody_refuses(fakes):
    fakes.refusals = dict.fromkeys(backends.BACKENDS, "cannot")
    with pytest.raises(RuntimeError, match=r"no backend runs .*K=3072.*triton: cannot.*reference: cannot"):
        dispatch.plan(CUDA)


def test_a_wish_comes_first(fakes, monkeypatch):
    assert run(CUDA, "reference") == "reference"
    assert run(CUDA) == "triton"
    dispatch.reset()
    monkeypatch.setenv(dispatch.ENVIRONMENT, " Torch ")
    assert run(CUDA) == "torch"
    assert run(CUDA, "comfy_kitchen") == "comfy_kitchen", "a model's own wish goes before the machine's"


def test_a_wish_that_cannot_be_met_is_said_once(fakes, caplog):
    fakes.refusals["triton"] = "compute capability 7.5 < 8.0"
    with caplog.at_level(logging.WARNING, "dit_quant"):
        for K in (3072, 3072, 12288):
            assert run(replace(CUDA, K=K), "triton") == "comfy_kitchen"
    assert caplog.messages == [
        "int8_linear: triton was asked for, but refuses (compute capability 7.5 < 8.0); comfy_kitchen runs instead"
    ]
    assert dict(dispatch.plan(CUDA, "triton").refusals) == fakes.refusals


def test_without_a_wish_a_refusal_is_not_a_warning(fakes, caplog):
    fakes.refusals["triton"] = "compute capability 7.5 < 8.0"
    assert run(CUDA) == "comfy_kitchen"
    assert caplog.messages == []


def test_unknown_names_are_errors(fakes, monkeypatch):
    with pytest.raises(ValueError, match=r"backend: unknown backend 'cutlass'; choose one of auto, triton, comfy_k"):
        dispatch.plan(CUDA, "cutlass")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cutlass")
    with pytest.raises(ValueError, match="DIT_QUANT_BACKEND: unknown backend 'cutlass'"):
        run(CUDA)


def test_failed_launch_is_replaced_for_good(fakes, caplog):
    fakes.errors["triton"] = RuntimeError("\nout of resource: shared memory\nRequired: 300000")
    with caplog.at_level(logging.WARNING, "dit_quant"):
        assert [run(CUDA) for _ in range(3)] == ["comfy_kitchen"] * 3
    assert fakes.calls == ["triton", *["comfy_kitchen"] * 3]
    reason = "failed at launch: RuntimeError: out of resource: shared memory"
    assert caplog.messages == [f"int8_linear: triton {reason}; comfy_kitchen runs instead"]
    assert dispatch.recorded() == {CUDA: Choice("int8_linear", "comfy_kitchen", (("triton", reason),))}
    assert run(replace(CUDA, K=64)) == "comfy_kitchen"
    assert fakes.calls.count("triton") == 2, "another class of shapes is tried afresh"


def test_several_failed_launches(fakes, caplog):
    fakes.errors = {name: RuntimeError(f"{name} broke") for name in ("triton", "comfy_kitchen")}
    with caplog.at_level(logging.WARNING, "dit_quant"):
        assert run(CUDA) == "torch"
    assert [name for name, _ in dispatch.plan(CUDA).refusals] == ["triton", "comfy_kitchen"]
    assert len(caplog.messages) == 2


def test_a_wish_that_fails_at_launch(fakes, caplog):
    fakes.errors["comfy_kitchen"] = TypeError("incompatible function arguments")
    with caplog.at_level(logging.WARNING, "dit_quant"):
        assert run(CUDA, "comfy_kitchen") == "triton"
    assert len(caplog.messages) == 1
    assert "comfy_kitchen failed at launch: TypeError" in caplog.messages[0]


def test_an_error_of_the_caller_is_raised_and_held_against_nobody(fakes, caplog):
    fakes.errors = {name: ValueError(f"{name}: shapes differ") for name in backends.BACKENDS}
    for _ in range(2):
        with pytest.raises(ValueError, match="triton: shapes differ"):
            run(CUDA)
    assert caplog.messages == []
    assert dispatch.recorded() == {}
    fakes.errors = {}
    assert run(CUDA) == "triton"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: unspecified launch failure"),
        MemoryError("no more"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
    ids=lambda error: str(error)[:40],
)
def test_errors_that_are_not_the_backends_pass_through(fakes, error):
    """The host frees memory and retries; a broken context must not be hidden by a slower kernel."""
    fakes.errors["triton"] = error
    with pytest.raises(type(error), match=str(error)[:20].replace("[", r"\[")):
        run(CUDA)
    assert fakes.calls == ["triton"]
    fakes.errors = {}
    assert run(CUDA) == "triton"


def test_out_of_memory_while_replacing_passes_through(fakes):
    fakes.errors = {"triton": RuntimeError("no kernel image"), "comfy_kitchen": torch.OutOfMemoryError("out of memory")}
    with pytest.raises(torch.OutOfMemoryError):
        run(CUDA)
    fakes.errors.pop("comfy_kitchen")
    assert run(CUDA) == "comfy_kitchen"


def test_a_backend_that_cannot_be_asked_is_a_refusal(fakes, monkeypatch):
    """Triton is found and does not import: a library is missing."""

    def load(op, backend):
        def refusal(shape):
            raise ImportError("DLL load failed while importing libtriton")

        found = fakes.load(op, backend)
        return Implementation(found.function, refusal) if backend == "triton" else found

    monkeypatch.setattr(dispatch, "load", load)
    assert run(CUDA) == "comfy_kitchen"
    reason = "cannot be asked: ImportError: DLL load failed while importing libtriton"
    assert dispatch.plan(CUDA).refusals == (("triton", reason),)


def test_threads_whose_backend_fails_together_blame_only_that_one(fakes, monkeypatch):
    """The second finds the next backend chosen already, which has done nothing wrong."""
    meeting = threading.Barrier(2)

    def load(op, backend):
        def function(*args, **kwargs):
            if backend == "triton":
                meeting.wait()
                raise RuntimeError("no kernel image")
            return backend

        return Implementation(function, lambda shape: None)

    monkeypatch.setattr(dispatch, "load", load)
    for _ in range(20):
        dispatch.reset()
        with ThreadPoolExecutor(2) as pool:
            found = [job.result() for job in [pool.submit(run, CUDA) for _ in range(2)]]
        assert found == ["comfy_kitchen"] * 2
        assert dispatch.plan(CUDA).refusals == (("triton", "failed at launch: RuntimeError: no kernel image"),)


def test_a_choice_that_another_thread_made_before_the_failure_is_made_anew(fakes, monkeypatch):
    """While the second thread was still being told that `triton` runs, the first saw it fail."""
    first = threading.get_ident()
    asked, failed = threading.Event(), threading.Event()
    ran = []

    def load(op, backend):
        def function(*args, **kwargs):
            ran.append(backend)
            if backend == "triton":
                raise RuntimeError("no kernel image")
            return backend

        def refusal(shape):
            if backend == "triton" and threading.get_ident() != first:
                asked.set()
                assert failed.wait(10)

        return Implementation(function, refusal)

    monkeypatch.setattr(dispatch, "load", load)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(run, CUDA)
        assert asked.wait(10)
        assert run(CUDA) == "comfy_kitchen"
        failed.set()
        assert second.result(10) == "comfy_kitchen"
    assert ran == ["triton", "comfy_kitchen"] * 2
    assert run(CUDA) == "comfy_kitchen"
    assert dispatch.plan(CUDA).refusals == (("triton", "failed at launch: RuntimeError: no kernel image"),)


def test_what_ran_is_recorded_not_what_was_planned(fakes):
    dispatch.plan(CUDA)
    assert dispatch.recorded() == {}
    run(CPU)
    assert dispatch.recorded() == {CPU: Choice("int8_linear", "native")}


@pytest.mark.parametrize(("M", "expected"), [(0, 0), (1, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192)])
def test_buckets(M, expected):
    assert dispatch.bucket(M) == expected


def test_an_empty_batch_is_the_references():
    index, fraction = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    codes, scale, zero = quantize_activation(torch.empty(0, 64), index=index, fraction=fraction)
    assert codes.shape == (0, 64)
    assert scale.shape == (0, 1)
    assert zero is None


def test_refusals_are_asked_by_the_names_they_know(monkeypatch):
    seen = {}

    def refusal(device, *, K, N=None, dtype=torch.float32):
        seen.update(device=device, K=K, N=N, dtype=dtype)
        return "no"

    assert backends._asking(refusal)(CUDA) == "no"
    assert seen == {"device": CUDA.device, "K": 3072, "N": 3072, "dtype": torch.bfloat16}
    assert backends._asking(None)(CUDA) is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'triton'", name="triton"), "triton is not installed"),
        (ModuleNotFoundError("", name="dit_quant.kernels.int8_linear.triton_impl"), "no int8_linear"),
        (OSError("libcuda.so.1: cannot open\nstack"), "does not import: OSError: libcuda.so.1: cannot open"),
    ],
)
def test_a_backend_that_does_not_import_is_a_refusal(monkeypatch, error, reason):
    def fail(*args):
        raise error

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    backends.load.cache_clear()
    assert backends.load("int8_linear", "triton") == reason
    backends.load.cache_clear()


def test_the_package_under_a_second_name_shares_the_ops():
    """The host loads the pack under its folder's name, tests and scripts under ours."""
    name = "another-name"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        ops = importlib.import_module(f"{name}.kernels.ops")
        x, index, fraction = torch.ones(3, 16), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
        codes, _, _ = ops.quantize_activation(x, index=index, fraction=fraction)
        assert bool((codes == 127).all())
    finally:
        for key in [key for key in sys.modules if key.partition(".")[0] == name]:
            del sys.modules[key]
    given = (torch.ones(3, 16), None, None, torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    codes, _, zero = torch.ops.dit_quant.quantize_activation(*given, None, None, 1, True, None, None, "reference")
    assert bool((codes == 127).all())
    assert zero.numel() == 0
