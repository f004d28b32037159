"""The measuring parts of benchmarks/calibration_cost.py."""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
from dit_quant.demo.emoji_dit import load_emoji_dit
from dit_quant.demo.experiment import Sampling, prepare
from dit_quant.demo.prompts import load_prompt_table

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "calibration_cost.py"


@pytest.fixture(scope="module")
def cost():
    spec = importlib.util.spec_from_file_location("calibration_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(wall, processor=None):
    return {"ratio": wall, "processor_ratio": processor or wall}


def test_ratios_are_those_of_the_medians(cost, monkeypatch):
    """Work of known length instead of a model: 2 s sampling, 3 s collecting, 1 s and 4 s quantizing."""
    clock, calls = [0.0], itertools.count()

    class Statistics:
        settings = {"statistics_bytes": 7}  # noqa: RUF012

    def takes(seconds, value=None):
        def work(*args):
            clock[0] += seconds * (10 if next(calls) == 6 else 1)  # one slow repeat of one part
            return value

        return work

    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cost.time, "process_time", lambda: clock[0] / 2)
    monkeypatch.setattr(cost, "draw", takes(2))
    monkeypatch.setattr(cost, "calibrate", takes(3, (Statistics, None)))
    monkeypatch.setattr(cost, "quantized_copy", lambda model, c, scheme: takes(1 if scheme.name == "W8A8" else 4)())
    found = cost.measure(None, None, Sampling(steps=2), 3)
    assert found["seconds"] == {"sample": 2, "collect": 3, "W8A8": 1, "W4A8": 4}
    assert found["processor_seconds"] == {"sample": 1, "collect": 1.5, "W8A8": 0.5, "W4A8": 2}
    assert found["ratio"] == found["processor_ratio"] == {"W8A8": 2, "W4A8": 3.5}
    assert found["statistics_bytes"] == 7


def test_a_real_model_is_measured(cost):
    table = load_prompt_table(cost.ASSETS / "emoji_prompts.safetensors")
    prompts = prepare(table, list(table.prompts[:1]), 0)
    found = cost.measure(load_emoji_dit(cost.ASSETS / "emoji_dit.safetensors"), prompts, Sampling(steps=1), 1)
    assert all(value > 0 for part in ("seconds", "processor_seconds", "ratio") for value in found[part].values())
    # the fp32 covariances of seven second MLP layers alone
    assert found["statistics_bytes"] > 7 * 1024**2 * 4
    assert json.loads(json.dumps(found)) == found
    assert cost.report(found).count("\n") == 2


@pytest.mark.parametrize(
    ("wall", "over"),
    [
        ({"W8A8": 3.0, "W4A8": 6.0}, []),
        ({"W8A8": 3.1, "W4A8": 1.0}, ["W8A8"]),
        ({"W8A8": 9, "W4A8": 9}, ["W8A8", "W4A8"]),
    ],
)
def test_limits(cost, wall, over):
    assert cost.exceeded(result(wall)) == over
