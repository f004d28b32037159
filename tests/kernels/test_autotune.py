"""Choice of tiles by measurement, with an injected clock: what is measured, when, and what is kept."""

import json
import logging
import threading

import pytest
import torch

pytest.importorskip("triton")

from dit_quant.kernels import autotune, user_cache
from dit_quant.kernels.tiles import TILES, bucket_of, candidates, tile_for

SHAPE = {"N": 3072, "K": 3072}
CPU = torch.device("cpu")


class Clock:
    """A timer by which `fast` takes no time and others 1 s; remembers what was launched."""

    def __init__(self, fast=None, failing=()):
        self.fast, self.failing, self.launched = fast, failing, []

    def launch(self, tile):
        self.launched.append(tile)
        if tile in self.failing:
            raise OutOfResources

    def __call__(self, call):
        call()
        return 0.0 if self.launched[-1] == self.fast else 1.0


class OutOfResources(Exception):
    """Named as Triton's."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "autotune.json"
    monkeypatch.setenv(autotune.CACHE, str(path))
    monkeypatch.setattr(autotune, "chosen", {})
    return path


def forget():
    """As a new process."""
    autotune.chosen.clear()


def tune(clock, M=4096, op="int8_linear", flags=(), **shape):
    N, K = ({**SHAPE, **shape}[name] for name in ("N", "K"))
    key = autotune.key_of(op, CPU, 90, M, N, K, flags)
    usual = tile_for(op, 90, M, N, K)
    return autotune.tuned_tile(key, candidates(op, 90, bucket_of(M), N, K), usual, clock.launch, CPU, timer=clock)


def test_another_triton_is_measured_anew(monkeypatch):
    """What it makes of a tile may not fit the card."""
    first, second = Clock(), Clock(fast=TILES["int8_linear", 90][1])
    tune(first)
    forget()
    monkeypatch.setattr("dit_quant.kernels.version_triton.VERSION", "99.0")
    assert tune(second) == second.fast
    assert len(second.launched) == len(first.launched) > 1


def test_off_unless_asked_for_at_the_call(monkeypatch):
    card = torch.device("cuda")
    monkeypatch.delenv(autotune.SWITCH, raising=False)
    assert not autotune.enabled(card)
    monkeypatch.setenv(autotune.SWITCH, "1")
    assert autotune.enabled(card)
    assert not autotune.enabled(CPU)
    monkeypatch.setenv(autotune.SWITCH, "0")
    assert not autotune.enabled(card)


def test_fastest_of_all_candidates(cache, caplog):
    tiles = TILES["int8_linear", 90]
    clock = Clock(fast=tiles[2])
    with caplog.at_level(logging.INFO, "dit_quant"):
        assert tune(clock) == tiles[2]
    assert f": 0.0 us with {tiles[2]}" in caplog.text
    assert f": 1000000.0 us with {tiles[1]}" in caplog.text
    assert clock.launched == list(candidates("int8_linear", 90, 4096, **SHAPE))
    assert len(json.loads(cache.read_text())["tiles"]) == 1


def test_every_m_of_a_bucket_is_tuned_once_also_after_a_restart():
    clock = Clock(fast=TILES["int8_linear", 90][1])
    first = tune(clock, M=2049)
    measured = len(clock.launched)
    for M in (2050, 3000, 4096):
        assert bucket_of(M) == bucket_of(2049)
        assert tune(clock, M=M) == first
    forget()
    assert tune(clock, M=4000) == first
    assert len(clock.launched) == measured
    tune(clock, M=4097)
    assert len(clock.launched) > measured


@pytest.mark.parametrize("change", [{"N": 1536}, {"K": 1536}, {"op": "int4_linear"}, {"flags": (torch.float16,)}])
def test_what_else_the_choice_depends_on(change):
    clock = Clock()
    tune(clock)
    measured = len(clock.launched)
    tune(clock, **change)
    assert len(clock.launched) > measured


def test_a_tile_that_does_not_fit_is_never_chosen():
    tiles = candidates("int8_linear", 90, 4096, **SHAPE)
    assert tune(Clock(fast=tiles[0], failing=tiles[:1])) in tiles[1:]
    with pytest.raises(RuntimeError, match="unset DIT_QUANT_AUTOTUNE"):
        tune(Clock(failing=tiles), M=1000)


def test_where_nothing_can_be_launched_the_cause_is_told():
    def broken(tile):
        raise ValueError("a bug")

    with pytest.raises(RuntimeError, match="tiles can be launched") as refusal:
        autotune.tuned_tile("a key", TILES["int8_linear", 90], TILES["int8_linear", 90][0], broken, CPU, timer=Clock())
    assert str(refusal.value.__cause__) == "a bug"


def test_a_tile_that_does_not_compile_is_left_out(cache):
    """Triton raises errors of many kinds there."""
    tiles = TILES["int8_linear", 90]

    class Fails(Clock):
        def launch(self, tile):
            super().launch(tile)
            if tile == tiles[0]:
                raise ValueError("pass failed")

    assert (
        autotune.tuned_tile("a key", tiles, tiles[0], (clock := Fails(tiles[0])).launch, CPU, timer=clock) == tiles[1]
    )


def test_faults_of_the_card_are_not_swallowed():
    def broken(tile):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        autotune.tuned_tile("a key", TILES["int8_linear", 90], TILES["int8_linear", 90][0], broken, CPU, timer=Clock())


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 1, "tiles": {"a": 1}}', "\0"])
def test_a_corrupted_file_is_a_warning_and_is_rewritten(content, cache, caplog):
    cache.parent.mkdir()
    cache.write_text(content)
    with caplog.at_level(logging.WARNING, "dit_quant"):
        tile = tune(Clock())
    assert str(cache) in caplog.text
    forget()
    clock = Clock()
    assert tune(clock) == tile
    assert clock.launched == []


def test_another_version_is_ignored_quietly(cache, caplog):
    cache.parent.mkdir()
    cache.write_text(json.dumps({"version": 0, "tiles": "anything"}))
    tune(Clock())
    assert caplog.text == ""
    assert json.loads(cache.read_text())["version"] == autotune.VERSION


def test_a_stored_tile_that_is_no_longer_shipped_is_tuned_again(cache):
    tune(Clock())
    content = json.loads(cache.read_text())
    for fields in content["tiles"].values():
        fields["block_m"] = 4096
    cache.write_text(json.dumps(content))
    forget()
    clock = Clock()
    tune(clock)
    assert clock.launched


def test_results_of_other_processes_are_kept(cache):
    tune(Clock(), N=1024)
    forget()
    tune(Clock(), N=2048)
    assert len(json.loads(cache.read_text())["tiles"]) == 2
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(autotune.CACHE, str(tmp_path / "file" / "autotune.json"))
    clock = Clock()
    tile = tune(clock)
    assert "not kept" in caplog.text
    measured = len(clock.launched)
    assert tune(clock) == tile
    assert len(clock.launched) == measured


def test_two_threads_measure_once():
    clock = Clock()
    threads = [threading.Thread(target=tune, args=(clock,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.launched == list(candidates("int8_linear", 90, 4096, **SHAPE))


@pytest.mark.parametrize(
    ("name", "variable", "expected"),
    [("posix", "XDG_CACHE_HOME", "dit_quant/autotune.json"), ("nt", "LOCALAPPDATA", "dit_quant/autotune.json")],
)
def test_default_place_is_the_users_cache_folder(name, variable, expected, monkeypatch, tmp_path):
    monkeypatch.delenv(autotune.CACHE)
    monkeypatch.delenv(user_cache.CACHE, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    # not os.name itself: pathlib looks at it
    monkeypatch.setattr(user_cache, "WINDOWS", name == "nt")
    assert autotune.cache_file() == tmp_path / expected


def test_one_variable_moves_all_caches(monkeypatch, tmp_path):
    monkeypatch.delenv(autotune.CACHE)
    monkeypatch.setenv(user_cache.CACHE, str(tmp_path))
    assert autotune.cache_file() == tmp_path / "autotune.json"
