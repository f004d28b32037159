"""benchmarks/prompt_count.py with few prompts and steps: every number is there, and shown."""

import json
import sys

from benchmark_scripts import BENCHMARKS, load

prompt_count, publish = load("prompt_count"), load("publish_prompt_count")


def test_quick_run_writes_every_number(monkeypatch, tmp_path):
    out = tmp_path / "deep" / "result.json"
    monkeypatch.setattr(sys, "argv", ["prompt_count.py", "--quick", "--out", str(out)])
    monkeypatch.setattr(prompt_count, "PLAIN", ("emoji",))
    monkeypatch.setattr(prompt_count, "SCHEMES", ("W8A8", "W4A8"))
    prompt_count.main()
    result = json.loads(out.read_text())
    assert set(result["models"]["emoji"]) == {"2"}
    found = result["models"]["emoji"]["2"]
    assert set(found) == {"W8A8", "W4A8"}
    assert 0 < found["W8A8"] < found["W4A8"] < 0.3
    first, _, row, *_ = publish.table(result).splitlines()
    assert first == "| prompts | SD3 layout, W8A8 | SD3 layout, W4A8 |"
    assert row == f"| 2 | {found['W8A8']:.4f} | {found['W4A8']:.4f} |"


def test_published_numbers_are_those_of_the_file():
    pages = load("pages")
    result = json.loads((BENCHMARKS / "results" / "prompt_count.json").read_text())
    assert publish.table(result) in (pages.ROOT / "docs" / "quality.md").read_text()
