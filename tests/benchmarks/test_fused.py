"""benchmarks/fused.py: what it writes, that it does not time what is wrong, its verdict, and its table."""

import json

import pytest
import torch
from benchmark_scripts import load
from dit_quant.kernels import backends, dispatch
from dit_quant.kernels.gelu_quantize import torch_impl as gelu_impl
from dit_quant.kernels.native.library import library
from dit_quant.kernels.quantize_activation import torch_impl as quantizer_impl

fused, checks, timing, publish_speed, pages = (
    load(name) for name in ("fused", "fused_checks", "kernel_timing", "publish_speed", "pages")
)
CPU = torch.device("cpu")
M, K = 20, 64
PRESETS = ("W8A8 fast", "W8A8 static", "W4A8")
DTYPES = (torch.float32, torch.bfloat16)


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
    """Every op on 20 rows of 64; nothing is measured about the machine."""
    monkeypatch.setattr(fused, "cases", lambda *given: [(place(op), M) for op in fused.OPS])
    monkeypatch.setattr(fused, "measure_roofline", lambda *given: timing.Roofline(1e10, 1e12, 5e11))


def place(op, model="PixArt"):
    return fused.Place(op, model, "fc1", K)


def written(folder):
    status = fused.main(["--device", "cpu", "--quick", "--out", str(folder / "f.json")])
    return status, json.loads((folder / "f.json").read_text())


def test_writes_times_ratios_and_shares(tiny, tmp_path, capsys):
    status, result = written(tmp_path)
    assert status == 0
    assert result["failed"] == {}
    assert result["passed"] == [f"{op}, torch" for op in sorted((*fused.OPS, "quantize_activation"))]
    assert result["machine"]["device"] == "cpu"
    assert "torch" in result["versions"]
    assert result["settings"]["rounds"] == 3
    assert result["roofline"]["copy_gb_per_s"] == 10.0
    rows = result["rows"]
    assert [(row["op"], row["dtype"], row["preset"]) for row in rows] == [
        (op, dtype, preset) for op in fused.OPS for dtype in ("float32", "bfloat16") for preset in PRESETS
    ]
    for row in rows:
        assert (row["model"], row["M"], row["K"], row["absent"]) == ("PixArt", M, K, {})
        assert row["hadamard"] == (1 if row["preset"] == "W8A8 fast" else 64)
        apart, ours = row["timed"]["apart"], row["timed"]["fused, torch"]
        for entry in (apart, ours):
            middle, low, high = entry["ms"]
            assert 0 < low <= middle <= high
            assert entry["roofline"] > 0
        assert apart["backend"] == "torch"
        middle, low, high = ours["times_apart"]
        assert 0 < low <= middle <= high
        assert 0 <= ours["distance"] < 0.02
    # operands and codes at 10 GB per s
    traffic = M * K * (2 * 2 + 1)
    assert rows[-1]["timed"]["apart"]["roofline"] == pytest.approx(
        traffic / 1e10 / (1e-3 * rows[-1]["timed"]["apart"]["ms"][0]), rel=1e-2
    )
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert all(line.startswith(f"{op}: fused, torch ") for op, line in zip(fused.OPS, out.splitlines(), strict=True))
    assert len(err.splitlines()) == len(rows)


@pytest.mark.skipif(isinstance(library(), str), reason=f"native: {library()}")
def test_native_is_what_stands_apart(tiny, tmp_path):
    status, result = written(tmp_path)
    assert status == 0
    assert result["refused"] == {f"{op}, native": f"no {op}" for op in fused.OPS}
    assert {row["timed"]["apart"]["backend"] for row in result["rows"]} == {"native"}
    assert not any("fused, native" in row["timed"] or row["absent"] for row in result["rows"])


def test_only_presets_without_directions():
    assert fused.FUSIBLE == PRESETS
    assert all(not fused.PRESETS[name].directions for name in fused.FUSIBLE)
    assert fused.PRESETS["W8A8"].directions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("op", fused.OPS)
def test_apart_and_fused_compute_the_same(op, preset, dtype):
    for model in ("PixArt", "FLUX double"):
        given = fused.random_input(fused.Place(op, model, "", 320), 62, dtype, CPU)
        whole, alone = fused.calls(given, preset)
        found, expected = whole.run(), alone.run()
        off = (checks.steps(found[0], found[2]) - checks.steps(expected[0], expected[2])).abs()
        # bf16 rounds in between: up to three times 2**-9 of 127 steps, and the range's ends with it
        most, few = (1, 1e-3) if dtype is torch.float32 else (2, 0.2)
        assert off.max() <= most
        assert (off > 0).float().mean() <= few
        assert checks.distance(found, expected) <= fused.LARGEST_DISTANCE[given.dtype]
        assert found[0].float().std() > 10, "the codes must fill their range, or the test proves nothing"


def test_an_op_that_is_wrong_is_not_timed(tiny, tmp_path, replace, capsys):
    right = gelu_impl.gelu_quantize

    def wrong(x, **options):
        codes, scale, zero = right(x, **options)
        return codes, scale * 1.001, zero

    replace(gelu_impl, "gelu_quantize", wrong)
    status, result = written(tmp_path)
    assert status == 1
    assert set(result["failed"]) == {"gelu_quantize, torch"}
    assert "wrong scales" in result["failed"]["gelu_quantize, torch"]
    for row in result["rows"]:
        broken = row["op"] == "gelu_quantize"
        assert set(row["timed"]) == ({"apart"} if broken else {"apart", "fused, torch"})
        assert row["absent"] == ({"fused, torch": "not timed: failed its check"} if broken else {})
    out = capsys.readouterr().out
    assert "gelu_quantize: not timed" in out
    assert "FAILED, not timed: gelu_quantize, torch" in out


def test_what_is_wrong_at_the_real_shape_alone_is_not_timed(tiny, tmp_path, replace):
    right = gelu_impl.gelu_quantize

    def wrong(x, **options):
        codes, scale, zero = right(x, **options)
        return codes.roll(1, dims=1) if x.shape[1] == K else codes, scale, zero

    replace(gelu_impl, "gelu_quantize", wrong)
    status, result = written(tmp_path)
    assert status == 1
    assert "gelu_quantize, torch" in result["passed"]
    assert len(result["failed"]) == 6
    assert all(label.startswith(f"gelu_quantize PixArt fc1 {M} x {K}") for label in result["failed"])
    broken = [row for row in result["rows"] if row["op"] == "gelu_quantize"]
    assert all(set(row["timed"]) == {"apart"} for row in broken)
    assert all("from the ops apart" in row["absent"]["fused, torch"] for row in broken)


def test_what_cannot_be_launched_has_a_reason(tiny, tmp_path, replace):
    right = gelu_impl.gelu_quantize

    def too_large(x, **options):
        if x.shape[1] == K:
            raise RuntimeError("out of resource: shared memory")
        return right(x, **options)

    replace(gelu_impl, "gelu_quantize", too_large)
    _, result = written(tmp_path)
    row = next(row for row in result["rows"] if row["op"] == "gelu_quantize")
    assert set(row["timed"]) == {"apart"}
    assert row["absent"]["fused, torch"] == "failed at launch: RuntimeError: out of resource: shared memory"


def test_a_wrong_quantizer_leaves_nothing_to_compare_with(tiny, tmp_path, replace, capsys):
    right = quantizer_impl.quantize_activation

    def off_by_two(x, **options):
        codes, scale, zero = right(x, **options)
        return codes.clamp(max=125) + 2, scale, zero

    replace(quantizer_impl, "quantize_activation", off_by_two)
    status, result = written(tmp_path)
    assert status == 1
    assert "quantize_activation, torch" in result["failed"]
    assert all(row["timed"] == {} for row in result["rows"])
    assert "quantize_activation of torch failed its check" in result["rows"][0]["absent"]["apart"]
    assert capsys.readouterr().out.startswith("adaln_quantize: not timed\n")


def test_an_op_that_raises_is_a_failure(replace):
    def broken(*given, **options):
        raise RuntimeError("no such instruction")

    replace(gelu_impl, "gelu_quantize", broken)
    found = checks.check_all(CPU, fused.small_calls(CPU, DTYPES))
    assert "14 x 256 float32, asymmetric, rotation of 1: RuntimeError: no such" in found.failed["gelu_quantize, torch"]
    assert not found.allows("gelu_quantize", "torch")
    assert found.allows("swiglu_quantize", "torch")


def timed_row(op, **ratios):
    timed = {f"fused, {backend}": {"times_apart": found} for backend, found in ratios.items()}
    timed["apart"] = {"backend": "native"}
    return {"op": op, "preset": "W4A8", "dtype": "bfloat16", "timed": timed}


def test_wins_only_where_it_is_surely_faster_on_every_row():
    rows = [
        timed_row("adaln_quantize", triton=[1.5, 1.2, 1.6], torch=[0.5, 0.4, 0.6]),
        timed_row("adaln_quantize", triton=[2.5, 1.1, 2.6], torch=[9.0, 8.0, 9.5]),
        timed_row("gelu_quantize", triton=[1.5, 1.2, 1.6], torch=[0.5, 0.4, 0.6]),
        timed_row("gelu_quantize", triton=[1.5, 1.0, 1.6], torch=[0.5, 0.4, 0.6]),
        timed_row("swiglu_quantize", triton=[1.5, 1.2, 1.6]),
        timed_row("swiglu_quantize"),
    ]
    # by its median torch would stand for the first
    assert fused.summary(rows) == [
        "adaln_quantize: fused, triton 2.00x apart; wins",
        "gelu_quantize: fused, triton 1.50x apart; does not win: surely faster on 1 of 2 rows",
        "swiglu_quantize: fused, triton 1.50x apart; does not win: surely faster on 1 of 2 rows",
    ]
    assert fused.summary(rows[:1])[1:] == ["gelu_quantize: not timed", "swiglu_quantize: not timed"]


def test_cases_are_the_inputs_of_the_device():
    on_cpu, on_cuda = (fused.cases(device, False) for device in ("cpu", "cuda"))
    assert {(p.op, p.model, p.layers, p.K) for p, _ in on_cpu} == {
        ("adaln_quantize", "PixArt", "qkv and fc1", 1152),
        ("adaln_quantize", "SD3.5-M", "qkv and fc1", 1536),
        ("adaln_quantize", "FLUX double", "qkv and fc1", 3072),
        ("gelu_quantize", "PixArt", "fc2", 4608),
    }
    widths = {op: [p.K for p, M in on_cuda if p.op == op and M == 256] for op in fused.OPS}
    assert widths == {
        "adaln_quantize": [1152, 1536, 3072, 5120],
        "gelu_quantize": [4608, 6144, 12288, 13824],
        "swiglu_quantize": [10240],
    }
    assert [p.op for p, _ in fused.cases("cpu", True)] == ["adaln_quantize", "gelu_quantize"]
    assert [p.op for p, _ in fused.cases("cuda", True)] == list(fused.OPS)


def test_no_cuda_is_said_plainly(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fused.main(["--device", "cuda", "--out", str(tmp_path / "f.json")]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_table_is_published_between_its_markers(monkeypatch, tmp_path):
    rows = [
        timed_row("gelu_quantize", triton=[1.5, 1.2, 1.6], torch=[0.5, 0.4, 0.6]),
        timed_row("gelu_quantize", triton=[1.25, 1.2, 1.6]),
        timed_row("swiglu_quantize", torch=[0.75, 0.7, 0.8]),
    ]
    result = {"machine": {"device": "cpu", "cpu": "C", "torch_threads": 2}, "versions": {"torch": "2"}, "rows": rows}
    (tmp_path / "fused_cpu.json").write_text(json.dumps(result))
    names = ("layer speed table", "model speed table", "fused speed table", "compile time table", "launch cost table")
    names = (*names, "gpu summary")
    markers = [(f"<!-- {name}: python benchmarks/publish_speed.py -->", f"<!-- end of {name} -->") for name in names]
    path = tmp_path / "README.md"
    path.write_text("before\n" + "".join(f"{first}\nold\n{last}\n" for first, last in markers) + "after\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(publish_speed, "RESULTS", tmp_path)
    publish_speed.main()
    lines = path.read_text().splitlines()
    first, last = map(lines.index, markers[2])
    assert lines[first + 2 : first + 6] == [
        "| op | preset | input | shapes | fused, triton | fused, torch |",
        "|---|---|---|---|---|---|",
        "| gelu_quantize | W4A8 | bfloat16 | 2 | 1.25x to 1.50x | 0.50x to 0.50x |",
        "| swiglu_quantize | W4A8 | bfloat16 | 1 | - | 0.75x to 0.75x |",
    ]
    assert "(native)" in lines[last - 2]
    assert lines[last - 2].endswith("C, 2 threads; torch 2.")
    assert lines[-1] == "after"
