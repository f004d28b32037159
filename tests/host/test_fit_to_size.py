"""Preset `fit to size`: files within their size, more of it is better, gains measured once, clear refusals."""

import host_prompts as p
import pytest
from dit_quant.quant_core.budget import GB
from dit_quant.quant_core.metrics import relative_l2
from host_server import PromptFailed

pytestmark = pytest.mark.host

FIT = "fit to size"
SIZES = (0.011, 0.014)  # W4A8 takes 0.0098, W8A8 0.012, 16 bits 0.017
MEASURED = {"measure_sensitivity": True}


def name(size: float) -> str:
    return f"fit {size}"


@pytest.fixture(scope="module")
def fitted(host_server):
    """The model fitted to both sizes, saved and sampled."""
    prompt = p.BASE | p.calibrate(**MEASURED) | p.sample("model", "full fit")
    for size in SIZES:
        prompt |= p.quantize(FIT, calibration="calibration", name=name(size), size_gb=size)
        prompt |= p.save(name(size), name(size)) | p.sample(name(size), f"{name(size)} latent")
    return host_server.run(prompt)


@pytest.mark.parametrize("size", SIZES)
def test_the_file_fits(host_server, fitted, size):
    taken = (host_server.output / "diffusion_models" / p.saved_name(name(size))).stat().st_size
    # most of a layer is the smallest step there is to fill up with
    assert 0.93 * size * GB < taken <= size * GB


def test_the_report_lists_the_choice(fitted):
    for size in SIZES:
        text = p.report(fitted, name(size))
        assert f"{FIT}: " in text
        assert "W8A8: " in text
        assert "predicted error of the final latent" in text
    assert "W4A8 g" in p.report(fitted, name(SIZES[0]))
    assert "kept in floating point (16 bits, chosen by the budget)" in p.report(fitted, name(SIZES[1]))


def test_more_bytes_are_closer_to_full_precision(host_server, fitted):
    latents = host_server.latents(fitted)
    small, large = (relative_l2(latents[f"{name(size)} latent"], latents["full fit"]) for size in SIZES)
    assert 0 < large < 0.5 * small
    assert small < 0.12  # the bound of W4A8


def gains_file(server):
    return max((server.models / "dit_quant_calibration").glob("*-gains.json"), key=lambda path: path.stat().st_mtime)


def calibrated_again(server, nonce: int) -> str:
    prompt = p.BASE | p.again(nonce) | p.calibrate("again", **MEASURED)
    return p.report(server.run(prompt | {"shown": p.node("PreviewAny", source=p.link("calibration", 1))}), "shown")


def test_gains_are_found_again_resumed_and_recomputed(host_server, fitted):
    """All from the cache; the last layers of a cut-off file; all of a damaged one: always the same numbers."""
    import json

    assert "sensitivity of 29 layers taken from the cache" in calibrated_again(host_server, 5001)
    path = gains_file(host_server)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"gains": dict(list(whole["gains"].items())[:27])}))
    assert "sensitivity of 27 layers taken from the cache" in calibrated_again(host_server, 5002)
    assert json.loads(path.read_text()) == whole
    path.write_text(path.read_text()[:100])
    assert "refused and measured again" in calibrated_again(host_server, 5003)
    assert json.loads(path.read_text()) == whole


def test_gains_that_cannot_be_written_are_used_all_the_same(host_server, fitted):
    path = gains_file(host_server)
    content = path.read_bytes()
    path.unlink()
    path.mkdir()
    try:
        text = calibrated_again(host_server, 5004)
    finally:
        path.rmdir()
        path.write_bytes(content)
    assert text.count("sensitivity not kept for another time: ") == 1
    assert "prompts taken from the cache" in text


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 0.011, "connect a calibration made with measure_sensitivity on"),
        (MEASURED, 0.005, r"0.005 GB wanted, the smallest choice needs 0.0\d+ GB, of which 0.00\d+ GB"),
        (MEASURED, 1.0, "fits as it is"),
    ],
    ids=["no gains", "too small", "too large"],
)
def test_refusals_name_the_remedy(host_server, fitted, changes, size, message):
    prompt = p.BASE | p.calibrate(**changes) | p.quantize(FIT, calibration="calibration", size_gb=size)
    with pytest.raises(PromptFailed, match=message) as failure:
        host_server.run(prompt | p.sample("quantized", "refused"))
    assert failure.value.node_type == "DiTQuantQuantize"


def test_a_calibration_is_needed(host_server):
    with pytest.raises(PromptFailed, match="fitting to a size needs a calibration"):
        host_server.run(p.BASE | p.quantize(FIT, calibration=None) | p.sample("quantized", "uncalibrated"))
