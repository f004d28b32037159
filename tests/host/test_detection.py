"""Models whose architecture the host reads off more than their weights stay the same model when quantized."""

import json
import subprocess
from pathlib import Path

import pytest
from host_location import ROOT, find_host, why_no_host

pytestmark = pytest.mark.host

SCRIPT = Path(__file__).with_name("compare_detection.py")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    host = find_host()
    if host is None:
        pytest.skip(f"HOST TESTS SKIPPED: {why_no_host()}")
    done = subprocess.run(
        [str(host.python), str(SCRIPT), str(ROOT), str(tmp_path_factory.mktemp("detection"))],
        cwd=host.root,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("name", "key"), [("pixart", "pe_interpolation"), ("ltxv", "positional_embedding_theta")])
def test_the_architecture_survives(comparison, name, key):
    found = comparison[name]
    assert found["loaded"] == ""
    # int8 rounding of one block; positions on another scale would change the velocity by far more
    assert found["error"] < 0.02
    assert found["error_loaded"] == pytest.approx(found["error"], rel=1e-3)
    assert key in found["unhinted"]
