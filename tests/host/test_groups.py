"""The timestep group follows the value of sigma while the host samples."""

import json
import struct
from dataclasses import dataclass

import host_prompts as p
import pytest
from dit_quant.quant_core.timesteps import TimestepGroups

pytestmark = pytest.mark.host

GROUPS = 4
STEPS = 10
SAMPLERS = {
    "euler": {},
    "dpmpp_2m": {"sampler_name": "dpmpp_2m"},
    "dpmpp_sde": {"sampler_name": "dpmpp_sde"},
    "denoise 0.6": {"denoise": 0.6, "latent_image": p.link("euler sampler")},
}
# SD3's shift 3 on the simple schedule: sigma = 3 t / (1 + 2 t) at t = 1, 0.9 ... 0.1
SCHEDULE = [3 * t / (1 + 2 * t) for t in (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)]


@dataclass(frozen=True)
class Call:
    """One call of the model: its sigma, and the active row and fraction of every partition."""

    sigma: float
    index: list[int]
    fraction: list[float]


@dataclass(frozen=True)
class Traces:
    """Calls by name of the run, and the partitions of the two saved files."""

    calls: dict[str, list[Call]]
    piecewise: TimestepGroups
    interpolated: TimestepGroups


def partition(path) -> TimestepGroups:
    """The one partition in a saved file: every layer's JSON names the same."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        found = []
        for key, entry in header.items():
            if key.endswith(".comfy_quant"):
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                found.append(json.loads(file.read(end - begin))["groups"])
    assert found
    assert all(groups == found[0] for groups in found)
    return TimestepGroups.from_json(found[0])


@pytest.fixture(scope="module")
def traces(host_server) -> Traces:
    prompt = p.BASE | p.calibrate(steps=STEPS, **p.NO_COVARIANCE) | p.group(groups=GROUPS)
    prompt |= p.quantize() | p.save("quantized", "traced")
    prompt |= p.group(groups=GROUPS, interpolate=True, name="smooth")
    prompt |= p.quantize(calibration="smooth", name="smooth model") | p.save("smooth model", "smooth")
    for name, changes in SAMPLERS.items():
        prompt |= p.trace("quantized", name) | p.sample(f"{name} traced", name, **{"steps": STEPS, **changes})
    prompt |= p.trace("smooth model", "interpolated")
    prompt |= p.sample("interpolated traced", "interpolated", steps=STEPS, sampler_name="dpmpp_sde")
    history = host_server.run(prompt)
    # the node shows both
    assert len(history.outputs["groups"]["images"]) == 1
    assert p.report(history, "groups").startswith(f"{GROUPS} groups, ")
    calls = {}
    for name in (*SAMPLERS, "interpolated"):
        lines = (host_server.output / "traces" / f"{name}.jsonl").read_text().splitlines()
        calls[name] = [Call(*json.loads(line)) for line in lines]
    folder = host_server.output / "diffusion_models"
    return Traces(calls, partition(folder / p.saved_name("traced")), partition(folder / p.saved_name("smooth")))


@pytest.mark.parametrize("name", SAMPLERS)
def test_group_is_that_of_sigma(traces, name):
    calls = traces.calls[name]
    assert [call.index for call in calls] == [[traces.piecewise.index(call.sigma)] for call in calls]
    assert all(call.fraction == [0.0] for call in calls)
    assert len({call.index[0] for call in calls}) > 1


def test_euler_goes_through_all_groups_in_order(traces):
    calls = traces.calls["euler"]
    assert [call.sigma for call in calls] == pytest.approx(SCHEDULE, rel=1e-4)
    edges = traces.piecewise.edges
    assert len(edges) == GROUPS - 1
    expected = [sum(sigma < edge for edge in edges) for sigma in SCHEDULE]
    found = [call.index[0] for call in calls]
    assert found == expected
    assert found == sorted(found)
    assert set(found) == set(range(GROUPS))


def test_multistep_sampler_visits_the_schedule(traces):
    assert [call.sigma for call in traces.calls["dpmpp_2m"]] == pytest.approx(SCHEDULE, rel=2e-3)


def test_sde_sampler_calls_between_the_calibrated_sigmas(traces):
    sigmas = [call.sigma for call in traces.calls["dpmpp_sde"]]
    off_grid = [sigma for sigma in sigmas if min(abs(sigma - s) for s in SCHEDULE) > 1e-3]
    assert len(off_grid) >= STEPS - 2


def test_partial_denoise_starts_in_a_later_group(traces):
    """Ten of the sixteen steps that a full run would take: no call at the noisiest level."""
    calls = traces.calls["denoise 0.6"]
    assert len(calls) == STEPS
    assert calls[0].sigma < 0.9
    assert calls[-1].index == [GROUPS - 1]


def test_interpolated_fraction_is_that_of_sigma(traces):
    groups = traces.interpolated
    assert groups.interpolate
    calls = traces.calls["interpolated"]
    for call in calls:
        row, fraction = groups.locate(call.sigma)
        assert call.index == [row]
        assert call.fraction == pytest.approx([fraction], abs=1e-4)
    assert any(0.05 < call.fraction[0] < 0.95 for call in calls)
