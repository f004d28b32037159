"""The end-to-end benchmark: its ratios are of one round, a wrong picture is never timed, and it runs on a host."""

import json

import pytest
from benchmark_scripts import load
from host_location import find_host, why_no_host


def timing(steps, latent=(1.0, 2.0), finite=True):
    return {
        "load_s": 1.0,
        "first_step_s": 2.0,
        "step_s": steps,
        "peak_process_bytes": 3,
        "peak_device_bytes": 0,
        "finite": finite,
        "latent": list(latent),
    }


def test_ratios_are_taken_within_a_round():
    script = load("end_to_end")
    found = {
        "fp32": [timing([2.0, 2.0, 9.0]), timing([20.0])],
        "W8A8": [timing([1.0]), timing([8.0])],
    }
    rows = script.summarize(found, {"fp32": 10, "W8A8": 5})
    # the machine was ten times slower in the second round: 2.0x and 2.5x
    assert rows["W8A8"]["times_fp32"] == pytest.approx(2.25)
    assert rows["fp32"]["times_fp32"] == 1.0


@pytest.mark.parametrize("bad", [timing([1.0], latent=(2.0, 1.0)), timing([1.0], finite=False)])
def test_a_wrong_picture_is_not_timed(bad):
    script = load("end_to_end")
    rows = script.summarize({"fp32": [timing([2.0])], "W8A8": [bad]}, {"fp32": 10, "W8A8": 5})
    assert "step_s" not in rows["W8A8"]
    assert "not timed" in rows["W8A8"]["wrong"]


@pytest.mark.host
def test_one_block_through_the_host(tmp_path):
    host = find_host()
    if host is None:
        pytest.skip(f"HOST TESTS SKIPPED: {why_no_host()}")
    out = tmp_path / "result.json"
    command = ["--depth=1", "--steps=1", "--rounds=1", "--flags=--cpu", "--rows", "fp32", "native int8", "W8A8", "W4A8"]
    place = ["--host", str(host.root), "--python", str(host.python), "--work", str(tmp_path), "--out", str(out)]
    assert load("end_to_end").main([*command, *place]) == 0
    result = json.loads(out.read_text())
    assert set(result["rows"]) == {"fp32", "native int8", "W8A8", "W4A8"}
    for name, row in result["rows"].items():
        assert "wrong" not in row, name
        assert row["step_s"] > 0, name
    assert result["rows"]["W8A8"]["latent_rel_l2"] < 0.05
    assert result["rows"]["W4A8"]["file_bytes"] < result["rows"]["W8A8"]["file_bytes"]
