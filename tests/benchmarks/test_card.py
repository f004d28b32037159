"""benchmarks/card.py: what it runs, within the time it has, and that one step's failure does not keep others back."""

import re
import sys
import time
from pathlib import Path

import pytest
from benchmark_scripts import BENCHMARKS, load

card = load("card")


def step(name, code, share=1.0, **environment):
    return card.Step(name, [sys.executable, "-c", code], share, environment)


def test_steps_exist_and_take_their_options(tmp_path):
    args = card.arguments(["--name", "x", "--host", str(tmp_path), "--results", str(tmp_path)])
    found = {s.name: s for s in card.steps(args)}
    assert list(found) == ["tests", "kernels", "launch_cost", "fused", "autotuned", "end_to_end"]
    tests = [Path(word) for word in found.pop("tests").command if word.endswith(".py")]
    assert len(tests) == len(card.TESTS)
    assert all(test.is_file() for test in tests)
    outputs = set()
    for name, s in found.items():
        script = {"autotuned": "kernels"}.get(name, name)
        assert s.command[1] == str(BENCHMARKS / f"{script}.py")
        parsed = load(script).arguments(s.command[2:])
        assert parsed.out.parent == tmp_path
        outputs.add(parsed.out)
    assert len(outputs) == len(found)
    assert found["autotuned"].environment["DIT_QUANT_AUTOTUNE"] == "1"


def test_every_number_of_tokens_is_timed():
    assert sorted(card.TOKENS) == sorted(load("kernel_shapes").CUDA_TOKENS)


def test_only_named_steps(tmp_path):
    assert [s.name for s in card.steps(card.arguments(["--name", "x", "--only", "fused", "tests"]))] == [
        "tests",
        "fused",
    ]


def test_a_failure_and_a_step_that_takes_too_long_keep_no_other_back(tmp_path, capsys):
    # the child of a step that is stopped would write a second later
    late = tmp_path / "late"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(late)!r}).write_text('')"
    slow = f"import subprocess, sys, time; print('begun'); subprocess.Popen([sys.executable, '-c', {child!r}])"
    todo = [
        step("fails", "print('why'); raise SystemExit(3)"),
        step("slow", f"{slow}; time.sleep(60)", 0.2),
        step("works", "import os; print(os.environ['WORD'])", WORD="told"),
    ]
    started = time.monotonic()
    outcomes = card.run_all(todo, 20, tmp_path, "x")
    assert time.monotonic() - started < 15
    assert outcomes["fails"] == f"failed with status 3; see {tmp_path / 'x_fails.log'}"
    assert re.match(r"stopped after \d s", outcomes["slow"])
    assert outcomes["works"] == "done"
    logs = {name: (tmp_path / f"x_{name}.log").read_text() for name in outcomes}
    assert "why" in logs["fails"]
    assert "begun" in logs["slow"]
    assert logs["works"].endswith("told\n")
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()] == list(outcomes)
    time.sleep(max(0.0, 8 - (time.monotonic() - started)))
    assert not late.exists()


def test_nothing_begins_without_time(tmp_path):
    assert card.run_all([step("late", "raise SystemExit(1)")], 0, tmp_path, "x") == {"late": "not begun: no time left"}


@pytest.mark.parametrize("options", [["--only", "kernel"], ["--only", "end_to_end"]])
def test_an_unknown_step_is_an_error(options, monkeypatch, capsys):
    monkeypatch.setattr(card.torch.cuda, "is_available", lambda: True)
    assert card.main(["--name", "x", *options]) == 2
    assert f"no step {options[1]}" in capsys.readouterr().err


def test_without_a_card_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(card.torch.cuda, "is_available", lambda: False)
    assert card.main(["--name", "x"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
