"""The report says what was done, in numbers and in words."""

import json

import pytest
from dit_quant.quant_core.report import LayerReport, QuantReport, SkippedLayer

LAYERS = (
    LayerReport("a", (64, 100), 8, 100, 4, 3, 7000, 0.01),
    LayerReport("b", (7, 33), 4, 11, 1, 1, 200, 0.1, note="a fallback"),
)
SKIPPED = tuple(SkippedLayer(f"s{i}", "embedder") for i in range(8))


def test_sizes_are_sums():
    report = QuantReport("W8A8", LAYERS, SKIPPED, ("family SD3",))
    assert report.weights == 6400 + 231
    assert report.nbytes == 7200
    assert report.bits_per_weight == pytest.approx(8 * 7200 / 6631)
    assert report.groups == 3


def test_text_names_every_fallback_and_reason():
    text = QuantReport("W8A8", LAYERS, SKIPPED, ("family SD3",)).text()
    for part in (
        "W8A8",
        "2 layers",
        "8.69 bits",
        "3 timestep groups",
        "family SD3",
        "b: a fallback",
        "embedder",
        "2 more",
    ):
        assert part in text


def test_warnings_come_first():
    notes = ("family SD3", "warning: slower", "int8_linear on cpu", "warning: and more")
    lines = QuantReport("W8A8", LAYERS, SKIPPED, notes).text().splitlines()
    assert lines[1:5] == ["warning: slower", "warning: and more", "family SD3", "int8_linear on cpu"]


def test_json_is_json():
    data = QuantReport("W8A8", LAYERS, SKIPPED).to_json()
    assert json.loads(json.dumps(data))["layers"][1]["note"] == "a fallback"


def test_an_empty_report_has_no_division_by_zero():
    report = QuantReport("W8A8", (), ())
    assert report.bits_per_weight == 0
    assert report.groups == 1


def test_a_note_of_many_layers_is_one_line():
    layers = tuple(LayerReport(f"l{i}", (64, 100), 8, 100, 4, 3, 7000, 0.01, note="K=100 is odd") for i in range(29))
    lines = QuantReport("W8A8", layers, ()).text().splitlines()
    assert lines[1:] == ["l0, l1, l2, l3, l4, l5 and 23 more: K=100 is odd"]
