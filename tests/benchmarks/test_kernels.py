"""benchmarks/kernels.py: what it writes, and that it does not time what is wrong."""

import json

import pytest
import torch
from benchmark_scripts import load
from dit_quant.kernels import backends, dispatch
from dit_quant.kernels.int8_linear import torch_impl as int8_impl
from dit_quant.kernels.native.library import library
from dit_quant.kernels.quantize_activation import torch_impl as quantizer_impl
from dit_quant.kernels.quantize_along import torch_impl as along_impl
from dit_quant.kernels.tiles import TILES, family_of, tile_for

kernels, checks, layers, shapes, timing = (
    load(name) for name in ("kernels", "kernel_checks", "kernel_layers", "kernel_shapes", "kernel_timing")
)
CPU = torch.device("cpu")
TINY = shapes.Layer("PixArt", "attention projection", 64, 96)
PRESETS = {"W8A8", "W8A8 fast", "W8A8 static", "W4A8"}


@pytest.fixture(autouse=True)
def _torch_alone(request, monkeypatch):
    """As on a machine without a compiler; `native` in a test's name: as it is."""
    if "native" not in request.node.name:
        monkeypatch.setattr(backends, "PORTABLE", ("torch", "reference"))
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture
def tiny(monkeypatch):
    """One layer of 64 x 96 at 20 tokens; nothing is measured about the machine."""
    monkeypatch.setattr(kernels, "cases", lambda *given: [(TINY, 20)])
    monkeypatch.setattr(kernels, "measure_roofline", lambda *given: timing.Roofline(1e10, 1e12, 5e11))


def written(folder, *options):
    status = kernels.main(["--device", "cpu", "--quick", "--out", str(folder / "k.json"), *options])
    return status, json.loads((folder / "k.json").read_text())


def test_writes_times_ratios_and_shares(tiny, tmp_path, capsys):
    status, result = written(tmp_path)
    assert status == 0
    assert result["failed"] == {}
    assert {f"{op}, torch" for op in checks.OPS} == set(result["passed"])
    assert result["machine"]["device"] == "cpu"
    assert {"torch", "triton"} <= set(result["versions"])
    assert result["roofline"] == {"copy_gb_per_s": 10.0, "int8_tops": 1.0, "bf16_tflops": 0.5}
    assert [row["dtype"] for row in result["rows"]] == ["float32", "bfloat16"]
    for row in result["rows"]:
        assert (row["M"], row["K"], row["N"]) == (20, 64, 96)
        timed = row["timed"]
        assert {*PRESETS, kernels.BF16, kernels.FP32} < set(timed)
        assert {f"{op} of W4A8, torch" for op in ("quantize_activation", "int4_linear")} < set(timed)
        for name, entry in timed.items():
            middle, low, high = entry["ms"]
            assert 0 < low <= middle <= high
            if name in PRESETS:
                assert entry["backends"] == ["torch"]
                assert 0 < entry["error"] < 0.15
                assert entry["roofline"] > 0
                assert len(entry["times_bf16"]) == len(entry["times_fp32"]) == 3
        # 64 columns are no whole rotation of 256
        assert "native int8 + ConvRot" in row["absent"]
    assert "| PixArt attention projection | 20 | 64 | 96 | float32 |" in capsys.readouterr().out


@pytest.mark.skipif(isinstance(library(), str), reason=f"native: {library()}")
def test_native_is_what_a_cpu_runs(tiny, tmp_path):
    status, result = written(tmp_path)
    assert status == 0
    assert {f"{op}, {name}" for op in checks.OPS for name in ("native", "torch")} == set(result["passed"])
    for row in result["rows"]:
        assert all(row["timed"][preset]["backends"] == ["native"] for preset in PRESETS)
        assert {"int8_linear of W8A8, native", "int8_linear of W8A8, torch"} < set(row["timed"])


def test_an_op_that_is_wrong_is_not_timed(tiny, tmp_path, replace, capsys):
    right = int8_impl.int8_linear
    replace(int8_impl, "int8_linear", lambda *given, **options: right(*given, **options) * 1.001)
    status, result = written(tmp_path)
    assert status == 1
    assert set(result["failed"]) == {"int8_linear, torch"}
    for row in result["rows"]:
        assert set(row["timed"]) & PRESETS == {"W4A8"}
        assert "failed its check" in row["absent"]["W8A8"]
        assert not any(name.startswith("int8_linear") for name in row["timed"])
    assert "FAILED, not timed: int8_linear, torch" in capsys.readouterr().out


def test_a_quantizer_that_is_wrong_stops_every_layer(tiny, tmp_path, replace):
    right = quantizer_impl.quantize_activation

    def off_by_one(x, **options):
        codes, scale, zero = right(x, **options)
        return codes.clamp(max=126) + 1, scale, zero

    for module in (quantizer_impl, along_impl):
        replace(module, "quantize_activation", off_by_one)
    status, result = written(tmp_path)
    assert status == 1
    assert not set(result["rows"][0]["timed"]) & PRESETS


def test_an_op_that_raises_is_a_failure(replace):
    def broken(*given, **options):
        raise RuntimeError("no such instruction")

    replace(int8_impl, "int8_linear", broken)
    found = checks.check_all(CPU, (torch.float32,))
    assert "no such instruction" in found.failed["int8_linear, torch"]
    assert not found.allows("int8_linear", "torch")
    assert found.allows("int4_linear", "torch")


def test_gpus_are_checked_with_the_tiles_that_are_timed():
    M, K, N = checks.shapes(torch.device("cuda"))[-1]
    assert tile_for("int4_linear", 90, M, N, K).decoded
    for capability in (80, 86, 89, 90, 100, 120):
        assert tile_for("int8_linear", capability, M, N, K) == TILES["int8_linear", family_of(capability)][0]
    assert set(checks.shapes(CPU)) < set(checks.shapes(torch.device("cuda")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_copy_moves_as_many_bytes_as_a_quantizer(dtype):
    problem = layers.Problem.random(TINY, 20, dtype, CPU)
    assert 2 * layers.copy(problem).run().nbytes == problem.x.nbytes + problem.x.numel()


def test_a_rival_of_another_function_has_no_time(tiny, tmp_path, monkeypatch):
    wrong = layers.Contender(lambda: torch.zeros(20, 96), largest_error=0.05)
    monkeypatch.setattr(layers, "rival", lambda problem, name: wrong)
    _, result = written(tmp_path)
    assert "its output is 1 from the layer's" in result["rows"][0]["absent"]["native int8"]


def test_the_slow_sit_out(monkeypatch):
    taken = {"a": 1.0, "b": 0.1}
    clock = timing.Clock(CPU)
    monkeypatch.setattr(clock, "time", lambda run: run())
    calls = {name: (lambda name=name: taken[name]) for name in taken}
    found = timing.race(clock, calls, rounds=5, budget=2.5)
    assert [s == s for s in found["a"]] == [True, True, True, False, False]
    assert [s == s for s in found["b"]] == [True] * 5
    assert timing.quartiles(found["a"]) == [1.0, 1.0, 1.0]
    assert timing.ratio(found["b"], found["a"]) == pytest.approx([0.1, 0.1, 0.1])


def test_nobody_always_follows_the_same(monkeypatch):
    order: list[str] = []
    clock = timing.Clock(CPU)
    monkeypatch.setattr(clock, "time", lambda run: order.append(run()) or 0.0)
    timing.race(clock, {name: (lambda name=name: name) for name in "abcdefgh"}, rounds=15, budget=1.0)
    rounds = [order[start : start + 8] for start in range(8, len(order), 8)]
    assert all(sorted(names) == list("abcdefgh") for names in rounds)
    for name in "abcdefgh":
        before = [names[names.index(name) - 1] for names in rounds if names[0] != name]
        assert max(before.count(other) for other in before) <= len(rounds) // 2


def test_cases_are_the_models_of_the_device():
    on_cpu, on_cuda = ({layer.model for layer, _ in shapes.cases(d, False)} for d in ("cpu", "cuda"))
    assert on_cpu == {"PixArt", "SD3.5-M", "FLUX double"}
    assert on_cuda == {"PixArt", "SD3.5-M", "FLUX double", "FLUX single", "Wan 14B", "Z-Image"}
    assert all(M >= 1024 and min(layer.K, layer.N) >= 1152 for layer, M in shapes.cases("cpu", False))
    assert [len(shapes.cases(d, True)) for d in ("cpu", "cuda")] == [1, 1]
    assert {layer.model for layer, _ in shapes.cases("cuda", False, "flux")} == {"FLUX double", "FLUX single"}


def test_no_cuda_and_no_model_are_said_plainly(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main(["--device", "cuda", "--out", str(tmp_path / "k.json")]) == 2
    assert kernels.main(["--device", "cpu", "--models", "wan", "--out", str(tmp_path / "k.json")]) == 2
    assert kernels.main(["--device", "cpu", "--tokens", "77", "--out", str(tmp_path / "k.json")]) == 2
    errors = capsys.readouterr().err
    assert "no CUDA device" in errors
    assert "'wan'" in errors
    assert "at 1024, 4096 tokens, none at [77]" in errors


def test_what_is_measured_is_written_at_once(tiny, tmp_path, monkeypatch):
    """The second layer breaks the run: the first one's row is there."""
    whole = kernels.measure

    def breaking(problem, *given):
        if breaking.calls:
            raise RuntimeError("the machine goes back")
        breaking.calls += 1
        return whole(problem, *given)

    breaking.calls = 0
    monkeypatch.setattr(kernels, "measure", breaking)
    twice = [(shapes.Layer("tiny", name, 64, 96), 20) for name in "ab"]
    monkeypatch.setattr(kernels, "cases", lambda *_: twice)
    with pytest.raises(RuntimeError, match="goes back"):
        kernels.main(["--device", "cpu", "--rounds", "2", "--out", str(tmp_path / "k.json")])
    assert [row["layer"] for row in json.loads((tmp_path / "k.json").read_text())["rows"]] == ["a"]
