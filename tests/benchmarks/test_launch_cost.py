"""What launches cost the host: both ways launch the same, one of them without asking Triton."""

import json
import subprocess
import sys

import pytest
from benchmark_scripts import BENCHMARKS, load
from dit_quant.kernels.triton_device import installed

publish_speed = load("publish_speed")


@pytest.mark.skipif(not installed(), reason="Triton is not installed")
def test_it_times_every_preset_both_ways(tmp_path):
    out = tmp_path / "cost.json"
    command = [sys.executable, str(BENCHMARKS / "launch_cost.py"), "--rounds", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())
    for preset in ("W8A8", "W8A8 fast", "W8A8 static", "W4A8"):
        assert all(result["rows"][preset][way] > 0 for way in ("again", "asked"))
    assert publish_speed.launch_table(result) in done.stdout


def test_table():
    result = {
        "machine": {"device": "NVIDIA X"},
        "versions": {"torch": "2", "triton": "3"},
        "tokens": 16,
        "channels": 64,
        "rows": {"W8A8": {"again": 60.4, "asked": 120.6}, "bf16 F.linear": {"again": 10.0}},
    }
    lines = publish_speed.launch_table(result).splitlines()
    assert lines[0] == "| | W8A8 | bf16 F.linear |"
    assert lines[2] == "| as it is | 60 us | 10 us |"
    assert lines[3] == "| Triton asked each time | 121 us | - |"
    assert "with the card's own driver; Triton 3. NVIDIA X; torch 2." in lines[-1]
    result["machine"] = {"device": "cpu", "cpu": "C", "torch_threads": 2}
    assert "no card; Triton 3. C, 2 threads; torch 2." in publish_speed.launch_table(result)
