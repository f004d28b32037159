"""The resumable calibration file: as if never interrupted, or refused and nothing touched."""

import json
import struct
from pathlib import Path

import pytest
import torch
from dit_quant.quant_core.calibration import finish, restore_progress, save_progress
from dit_quant.quant_core.collector import Collector
from dit_quant.quant_core.curvature import CurvatureCollector
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
    collector.settle()
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
        for field in ("count", "mean", "minimum", "maximum", "second_moment", "rows", "row_bin"):
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


SHARING = {"q": 33, "k": 33, "v": 33, "out": 33, "silent": 33}


def feed_shared(collector, prompts):
    """q, k and v read one tensor, v another one from prompt 3 on; values beyond fp16 from prompt 2 on."""
    for prompt in prompts:
        found = drift(33, 4, seed=prompt)
        for sigma, x in zip(found.sigmas, found.samples, strict=True):
            x = x * 1e5 if prompt > 1 else x
            collector.at(sigma)
            for name in ("q", "k"):
                collector.record(name, x)
            collector.record("v", x + 1 if prompt > 2 else x)
            collector.record("out", x - 1)
    return collector


@pytest.mark.parametrize("stop", range(6))
def test_layers_that_share_are_written_once_and_part_after_a_resume_as_without(tmp_path, stop):
    path = tmp_path / "cache.safetensors"

    def empty():
        return Collector(SHARING, flow=True, covariance=11, max_bins=5, rows=4)

    whole, half = feed_shared(empty(), range(5)), feed_shared(empty(), range(stop))
    save_progress(path, half, KEY, stop)
    written = {name.split("|")[0] for name in read_tensors(path)[0]}
    assert written == ({"q"} if stop == 0 else {"q", "out", "silent"} if stop < 4 else {"q", "v", "out", "silent"})
    resumed = empty()
    with torch.inference_mode():  # as the host does
        restore_progress(path, resumed, KEY)
        feed_shared(resumed, range(stop, 5))
    assert_same(snapshot(whole), snapshot(resumed))
    assert list(whole.groups().values()) == list(resumed.groups().values())


def test_a_pass_left_in_its_file_gives_the_same_statistics(tmp_path):
    """copy=False: nothing is changed in the file, and its tensors are mapped rather than read into memory."""
    path = tmp_path / "cache.safetensors"
    collector = feed(fresh(), range(3))
    save_progress(path, collector, KEY, 3)
    content = path.read_bytes()
    mapped = fresh()
    restore_progress(path, mapped, KEY, copy=False)
    one, two = finish(collector, {}, {}), finish(mapped, {}, {})
    for name, statistics in one.layers.items():
        for field in ("count", "mean", "minimum", "maximum", "second_moment", "rows", "row_bin"):
            assert torch.equal(getattr(statistics, field), getattr(two.layers[name], field))
    assert path.read_bytes() == content


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_covariances_left_in_their_file_take_no_memory(tmp_path):
    def private():
        (line,) = (li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    path, K = tmp_path / "cache.safetensors", 3072
    collector = Collector({"a": K}, flow=True, covariance=K, rows=2, max_bins=1)
    collector.at(0.5)
    collector.record("a", torch.ones(2, K))
    save_progress(path, collector, KEY, 1)
    mapped = Collector({"a": K}, flow=True, covariance=K, rows=2, max_bins=1)
    before = private()
    restore_progress(path, mapped, KEY, copy=False)
    moment = finish(mapped, {}, {}).layers["a"].second_moment
    assert float(moment.sum()) == K * K  # every page is read
    assert private() - before < moment.nbytes / 4


def test_passes_over_different_layers_join(tmp_path):
    """Each half of the layers observed in a pass of its own: as if in one."""
    whole = finish(feed(fresh(), range(4)), {"a": "1"}, {"steps": 4})
    passes = []
    for names in (("b.c",), ("a", "silent")):
        features = {name: FEATURES[name] for name in names}
        sigmas = passes[0].sigmas if passes else ()
        part = Collector(features, flow=True, covariance=16, max_bins=5, sigmas=sigmas)
        for prompt in range(4):
            small, large = drift(7, 4, seed=prompt), drift(33, 4, seed=prompt)
            for t, sigma in enumerate(small.sigmas):
                part.at(sigma - 0.01 * (prompt % 3))
                if "a" in names:
                    part.record("a", small.samples[t])
                elif prompt != 1:
                    part.record("b.c", large.samples[t])
        passes.append(part)
    joined = finish(passes[0], {"a": "1"}, {"steps": 4}, passes[1:])
    assert joined.sigmas == whole.sigmas
    assert joined.silent == whole.silent
    assert joined.layers.keys() == whole.layers.keys()
    for name, statistics in whole.layers.items():
        assert torch.equal(joined.layers[name].second_moment, statistics.second_moment)
        assert float(joined.layers[name].count.sum()) == float(statistics.count.sum())
    # the first pass chose the bins, as the only one does
    for field in ("count", "mean", "minimum", "maximum", "rows", "row_bin"):
        assert torch.equal(getattr(joined.layers["b.c"], field), getattr(whole.layers["b.c"], field))


def test_a_later_pass_over_other_noise_levels_is_refused(tmp_path):
    path = tmp_path / "cache.safetensors"
    save_progress(path, feed(fresh(), [0]), KEY, 1)
    other = Collector(FEATURES, flow=True, covariance=16, sigmas=[0.9, 0.5, 0.4, 0.3, 0.2])
    with pytest.raises(DamagedFile, match="other noise levels"):
        restore_progress(path, other, KEY)


def test_a_resumed_collector_does_not_need_its_file(tmp_path):
    """It writes over it after the next prompt, which Windows refuses while the file is mapped."""
    path = tmp_path / "cache.safetensors"
    collector = feed(fresh(), range(2))
    save_progress(path, collector, KEY, 2)
    resumed = fresh()
    restore_progress(path, resumed, KEY)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same(snapshot(resumed), snapshot(collector))


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
    "more sigmas": (put("sigmas", "[0.9, 0.8, 0.7, 0.6, 0.5, 0.4]"), "other noise levels"),
    "no count of prompts": (drop("done"), "incomplete"),
    "no table of shared layers": (drop("shared"), "incomplete"),
    "shared layers that are no table": (put("shared", "[1]"), "incomplete"),
    "shared with a layer that is not there": (put("shared", '{"silent": "x"}'), "x is missing"),
    "shared with a layer of another width": (put("shared", '{"silent": "b.c"}'), "b.c total"),
    "missing layer": (drop("b.c|count"), "b.c is missing"),
    "missing tensor": (drop("b.c|minimum"), "b.c minimum"),
    "missing moment": (drop("b.c|moment"), "b.c moment"),
    "wrong width": (put("b.c|total", torch.zeros(5, 7, dtype=torch.float64)), "b.c total"),
    "wrong moment": (put("b.c|moment", torch.zeros(1, 33, 33)), "b.c moment"),
    "wrong keys": (put("a|keys", torch.zeros(5, 24)), "a keys"),
    "missing rows": (drop("a|rows"), "a rows"),
    "wrong rows": (put("a|rows", torch.zeros(5, 24, 7)), "a keys"),
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


def curvature(*layers, failure=""):
    found = CurvatureCollector({"a": 6, "b.c": 4}, 3)
    for name in layers:
        found.record(name, torch.randn(5, found.shapes[name][0] * found.shapes[name][1]))
        found.probes += 1
    found.failure = failure
    return found


@pytest.mark.parametrize("copy", [True, False], ids=["copied", "mapped"])
@pytest.mark.parametrize("layers", [("a", "b.c"), ("a",), ()])
def test_curvatures_are_kept_beside_the_statistics(tmp_path, layers, copy):
    """A layer that no gradient reached has none."""
    path = tmp_path / "cache.safetensors"
    saved, restored = curvature(*layers), curvature()
    save_progress(path, feed(fresh(), range(2)), KEY, 2, saved)
    assert restore_progress(path, fresh(), KEY, restored, copy=copy) == 2
    assert restored.probes == len(layers)
    assert restored.moments.keys() == set(layers)
    assert all(torch.equal(restored.moments[name], saved.moments[name]) for name in layers)
    assert (finish(feed(fresh(), [0]), {}, {}, curvature=restored.moments).curvature is None) == (layers == ())
    # as without: who does not ask for curvatures gets the statistics
    assert restore_progress(path, fresh(), KEY) == 2


def test_a_failed_measurement_is_not_begun_anew(tmp_path):
    path = tmp_path / "cache.safetensors"
    save_progress(path, feed(fresh(), range(2)), KEY, 2, curvature(failure="OutOfMemoryError: 3 GB"))
    restored = curvature()
    restore_progress(path, fresh(), KEY, restored)
    assert restored.failure == "OutOfMemoryError: 3 GB"
    assert not restored.due()


CURVATURE_CHANGES = {
    "wrong shape": (put("a|curvature", torch.zeros(1, 3, 3)), "a curvature should be"),
    "wrong dtype": (put("b.c|curvature", torch.zeros(2, 2, 2).half()), "b.c curvature"),
    "no count of probes": (drop("probes"), "incomplete"),
    "probes that are no number": (put("probes", "many"), "incomplete"),
    "no failure": (drop("probe_failure"), "incomplete"),
}


@pytest.mark.parametrize(("change", "message"), CURVATURE_CHANGES.values(), ids=CURVATURE_CHANGES.keys())
def test_curvatures_that_do_not_fit_are_refused_and_nothing_changes(tmp_path, change, message):
    path = tmp_path / "cache.safetensors"
    save_progress(path, feed(fresh(), range(3)), KEY, 3, curvature("a", "b.c"))
    rewritten(path, change)
    collector, outputs = feed(fresh(), [7]), curvature("a")
    before, moments = snapshot(collector), dict(outputs.moments)
    with pytest.raises(DamagedFile, match=message):
        restore_progress(path, collector, KEY, outputs)
    assert_same(snapshot(collector), before)
    assert outputs.moments == moments
    assert outputs.probes == 1


def test_calibrating_nothing_is_refused():
    with pytest.raises(ValueError, match="recorded nothing"):
        finish(fresh(), {}, {})


def test_settings_and_fingerprints_are_kept():
    done = finish(feed(fresh(), [0]), {"a": "1234"}, {"steps": 4})
    assert done.fingerprints == {"a": "1234"}
    assert json.dumps(done.settings) == '{"steps": 4}'
    assert done.flow
    assert list(done.sigmas) == sorted(done.sigmas, reverse=True)
