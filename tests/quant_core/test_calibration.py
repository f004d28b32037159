"""The resumable calibration file: as if never interrupted, or refused and nothing touched."""

import json
import struct

import pytest
import torch
from dit_quant.quant_core.calibration import finish, restore_progress, save_progress
from dit_quant.quant_core.collector import Collector
from dit_quant.quant_core.files import DamagedFile, read_tensors, write_tensors
from drift import drift

FEATURES = {"a": 7, "b.c": 33, "silent": 7}
KEY = "model and prompts"


def fresh():
    return Collector(FEATURES, flow=True, covariance=16, max_bins=5)


def feed(collector, prompts):
    """Each prompt visits its own sigmas, more of them than there are bins."""
    for prompt in prompts:
        small, large = drift(7, 4, seed=prompt), drift(33, 4, seed=prompt)
        for t, sigma in enumerate(small.sigmas):
            collector.at(sigma - 0.01 * (prompt % 3))
            collector.record("a", small.samples[t])
            if prompt != 1:
                collector.record("b.c", large.samples[t])
    return collector


def snapshot(collector):
    sums = {
        (name, field): value.clone()
        for name, observer in collector.observers.items()
        for field, value in observer.tensors().items()
    }
    return list(collector.sigmas), sums


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][key], b[1][key]) for key in a[1])


def test_resumed_equals_uninterrupted(tmp_path):
    path = tmp_path / "cache.safetensors"
    whole = feed(fresh(), range(5))
    save_progress(path, feed(fresh(), range(2)), KEY, 2)
    resumed = fresh()
    assert restore_progress(path, resumed, KEY) == 2
    feed(resumed, range(2, 5))
    assert_same(snapshot(whole), snapshot(resumed))
    one, two = finish(whole, {}, {}), finish(resumed, {}, {})
    assert one.sigmas == two.sigmas
    assert one.silent == two.silent
    assert set(one.silent) == {"silent"}
    for name, statistics in one.layers.items():
        for field in ("count", "mean", "minimum", "maximum", "second_moment"):
            assert torch.equal(getattr(statistics, field), getattr(two.layers[name], field))


def test_a_saved_file_does_not_follow_its_collector(tmp_path):
    path = tmp_path / "cache.safetensors"
    collector = feed(fresh(), range(2))
    before = snapshot(collector)
    save_progress(path, collector, KEY, 2)
    feed(collector, range(2, 4))
    restored = fresh()
    restore_progress(path, restored, KEY)
    assert_same(snapshot(restored), before)


def test_an_empty_collector_round_trips(tmp_path):
    path = tmp_path / "cache.safetensors"
    save_progress(path, fresh(), KEY, 0)
    assert restore_progress(path, fresh(), KEY) == 0


def rewritten(path, change):
    """The file with its tensors or metadata changed."""
    tensors, metadata = read_tensors(path)
    change(tensors, metadata)
    path.unlink()
    write_tensors(path, tensors, metadata)


def drop(key):
    return lambda tensors, metadata: (tensors.pop(key, None), metadata.pop(key, None))


def put(key, value):
    return lambda tensors, metadata: (metadata if isinstance(value, str) else tensors).__setitem__(key, value)


CHANGES = {
    "other format": (put("format", "pt"), "not a calibration cache"),
    "no format": (drop("format"), "not a calibration cache"),
    "other version": (put("version", "0"), "cache version 0"),
    "foreign key": (put("key", "another model"), "another model"),
    "no key": (drop("key"), "another model"),
    "no sigmas": (drop("sigmas"), "incomplete"),
    "sigmas that are no list": (put("sigmas", "3"), "incomplete"),
    "sigmas that are no json": (put("sigmas", "[1,"), "incomplete"),
    "fewer sigmas": (put("sigmas", "[0.5]"), "wrong number of timesteps"),
    "no count of prompts": (drop("done"), "incomplete"),
    "missing layer": (drop("b.c|count"), "b.c is missing"),
    "missing tensor": (drop("b.c|minimum"), "b.c minimum"),
    "missing moment": (drop("b.c|moment"), "b.c moment"),
    "wrong width": (put("b.c|total", torch.zeros(5, 7, dtype=torch.float64)), "b.c total"),
    "wrong moment": (put("b.c|moment", torch.zeros(1, 33, 33)), "b.c moment"),
    "wrong rank": (put("a|count", torch.zeros(5, 1)), "a is missing or"),
    "wrong dtype": (put("a|maximum", torch.zeros(5, 7, dtype=torch.int8)), "a maximum"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_file_that_does_not_fit_is_refused_and_nothing_changes(tmp_path, change, message):
    path = tmp_path / "cache.safetensors"
    save_progress(path, feed(fresh(), range(3)), KEY, 3)
    rewritten(path, change)
    collector = feed(fresh(), [7])
    before = snapshot(collector)
    with pytest.raises(DamagedFile, match=message) as refusal:
        restore_progress(path, collector, KEY)
    assert "cache.safetensors" in str(refusal.value)
    assert_same(snapshot(collector), before)


def truncated(content):
    return content[: len(content) * 2 // 3]


def oversized(content):
    return struct.pack("<Q", 2**40) + content[8:]


@pytest.mark.parametrize("damage", [truncated, oversized, lambda _: b"", lambda _: b"PK\x03\x04 a zip file"])
def test_a_damaged_file_is_refused_and_nothing_changes(tmp_path, damage):
    path = tmp_path / "cache.safetensors"
    save_progress(path, feed(fresh(), range(3)), KEY, 3)
    path.write_bytes(damage(path.read_bytes()))
    collector = fresh()
    before = snapshot(collector)
    with pytest.raises(DamagedFile, match=r"cache\.safetensors"):
        restore_progress(path, collector, KEY)
    assert_same(snapshot(collector), before)


def test_calibrating_nothing_is_refused():
    with pytest.raises(ValueError, match="recorded nothing"):
        finish(fresh(), {}, {})


def test_settings_and_fingerprints_are_kept():
    done = finish(feed(fresh(), [0]), {"a": "1234"}, {"steps": 4})
    assert done.fingerprints == {"a": "1234"}
    assert json.dumps(done.settings) == '{"steps": 4}'
    assert done.flow
    assert list(done.sigmas) == sorted(done.sigmas, reverse=True)
