"""The backend input of Quantize DiT: it travels with the MODEL, is never saved, and the report says what runs."""

import json

import host_prompts as p
import pytest
from dit_quant.quant_core.metrics import relative_l2
from host_server import PromptFailed

pytestmark = pytest.mark.host

# where two ways of adding round a tie differently a code moves by one, and layers further on rounding noise is all
# that two latents have in common: backends are compared by their distance from full precision
NO_WORSE = 1.25


def quantize(backend: str, name: str, **changes) -> dict:
    return p.quantize("rtn_w8a8", calibration=None, name=name, backend=backend, **changes)


def wishes(model: str, name: str) -> dict:
    return {f"{name} wishes": p.node("DiTQuantTestWishes", model=p.link(model), name=name)}


@pytest.fixture(scope="module")
def results(host_server):
    """A reference MODEL sampled, rebuilt, saved; one that asks for what a CPU lacks; one that asks for nothing."""
    prompt = p.BASE | p.sample("model", "backend full")
    for backend in ("auto", "reference", "triton"):
        prompt |= quantize(backend, backend) | p.sample(backend, f"backend {backend}") | wishes(backend, backend)
    prompt |= {"rebuilt": p.node("DiTQuantTestRebuild", model=p.link("reference"))} | wishes("rebuilt", "rebuilt")
    prompt |= p.save("reference", "backend")
    return host_server.run(prompt)


def read_wishes(host_server, name: str) -> list[str]:
    return json.loads((host_server.output / "wishes" / f"{name}.json").read_text())


def test_the_wish_travels_with_the_model(host_server, results):
    assert [read_wishes(host_server, name) for name in ("auto", "reference", "rebuilt")] == [
        ["auto"],
        ["reference"],
        ["reference"],
    ]


def test_the_wish_is_not_saved(host_server, results):
    host_server.run(p.load("backend") | wishes("quantized", "loaded"))
    assert read_wishes(host_server, "loaded") == ["auto"]


def test_report_says_what_runs(results):
    text = p.report(results, "reference")
    assert "int8_linear on cpu: reference, 29 layers\n" in text
    assert "quantize_activation on cpu: reference, " in text


def test_report_and_log_say_why_a_wish_is_not_met(host_server, results):
    line = next(line for line in p.report(results, "triton").splitlines() if line.startswith("int8_linear"))
    backend, refusal = line.removeprefix("int8_linear on cpu: ").split("; ")[:2]
    assert backend.partition(",")[0] in ("native", "torch", "reference")
    refusal = refusal.removeprefix("triton: ")
    assert f"int8_linear: triton was asked for, but refuses ({refusal})" in host_server.log_text()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_report_says_what_it_costs(host_server, results, backend):
    """Which is faster depends on the machine; slower must be a warning, in the log too."""
    (line,) = [line for line in p.report(results, backend).splitlines() if "times as long" in line]
    factor = float(line.partition(" times as long")[0].rpartition(" ")[2])
    assert line.endswith("as in float32 (256 tokens, measured)")
    assert line.startswith("warning: slower than full precision: ") == (factor > 1.05)
    log = next(entry for entry in host_server.log_text().splitlines() if line in entry)
    assert ("WARNING" in log) == (factor > 1.05)


def test_every_backend_is_as_close_to_full_precision(host_server, results):
    latents = host_server.latents(results)

    def error(backend: str) -> float:
        return relative_l2(latents[f"backend {backend}"], latents["backend full"])

    for backend in ("auto", "triton"):
        assert 0 < error(backend) < NO_WORSE * error("reference")


def test_an_unknown_name_is_refused(host_server):
    with pytest.raises(PromptFailed, match="backend"):
        host_server.run(p.BASE | quantize("cutlass", "quantized") | p.save("quantized", "unknown"))
