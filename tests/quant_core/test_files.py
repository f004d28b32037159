"""Files: an old one survives every failure, a damaged one is refused before a tensor is read."""

import json
import os
import shutil
import stat
import struct
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from dit_quant.quant_core import files
from dit_quant.quant_core.files import DamagedFile, read_header, read_tensors, write_tensors

TENSORS = {"a": torch.arange(7.0), "b": torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new folder" / "model.safetensors"


def test_round_trip(path):
    write_tensors(path, TENSORS, {"key": "value"})
    tensors, metadata = read_tensors(path)
    assert metadata == {"key": "value"}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], TENSORS[key]) for key in TENSORS)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_views_are_written_as_they_look(path):
    table = torch.arange(12.0).reshape(3, 4)
    write_tensors(path, {"t": table.T, "s": table[:, 1:3].requires_grad_()}, {})
    tensors, _ = read_tensors(path)
    assert torch.equal(tensors["t"], table.T)
    assert torch.equal(tensors["s"], table[:, 1:3])


def break_after_writing(_tensors, target, _metadata):
    target.write_bytes(b"half of it")
    raise RuntimeError("the power went")


def break_silently(_tensors, target, _metadata):
    raise files.SafetensorError("I/O error: no space left on device")


def interrupt(_tensors, target, _metadata):
    target.write_bytes(b"half of it")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(break_after_writing, RuntimeError), (break_silently, OSError), (interrupt, KeyboardInterrupt)],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(path, monkeypatch, failure, expected):
    write_tensors(path, TENSORS, {"which": "old"})
    before = path.read_bytes()
    monkeypatch.setattr(files, "save_file", failure)
    with pytest.raises(expected):
        write_tensors(path, TENSORS, {"which": "new"})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    write_tensors(path, TENSORS, {"which": "old"})
    before = path.read_bytes()

    def refuse(*_args):
        raise PermissionError("in use")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(PermissionError):
        write_tensors(path, TENSORS, {"which": "new"})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_refused_before_writing(path, monkeypatch):
    write_tensors(path, TENSORS, {"which": "old"})
    before = path.read_bytes()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(100, 90, 10))
    with pytest.raises(OSError, match=r"model\.safetensors needs .* MB, the disk of .*new folder has 0 MB left"):
        write_tensors(path, TENSORS, {"which": "new"})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def raw_file(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def header_with(offsets) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()


DAMAGED = {
    "empty": (b"", "too few"),
    "short": (b"1234567", "too few"),
    "text": (b"this is a text file, nothing else", "not a safetensors file"),
    "oversized header": (raw_file(b"{}", length=2**62), "not a safetensors file"),
    "header beyond the end": (raw_file(b"{}", length=1000), "cut off"),
    "no json": (raw_file(b"{not json"), "not JSON"),
    "bad unicode": (raw_file(b"\xff\xfe\xfd"), "not JSON"),
    "list": (raw_file(b"[1, 2]"), "not a JSON object"),
    "missing data": (raw_file(header_with([0, 4]), b"12"), "cut off"),
    "offsets that are no numbers": (raw_file(header_with([0, "x"]), b"1234"), "model"),
    "offsets that are none": (raw_file(header_with([None, None]), b"1234"), "model"),
    "negative offsets": (raw_file(header_with([-4, 0]), b"1234"), "model"),
    "metadata that is no object": (raw_file(b'{"__metadata__": [1]}'), "model"),
    "entry that is no object": (raw_file(b'{"a": 3}'), "model"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=message) as refusal:
        read_tensors(path)
    assert "model.safetensors" in str(refusal.value)


def test_every_truncation_is_refused(path):
    write_tensors(path, TENSORS, {"key": "value"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile, match="model"):
            read_tensors(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(DamagedFile, match="cannot be read"):
            read_header(path)


@pytest.mark.skipif(os.name == "nt", reason="permissions of another kind")
def test_a_file_has_the_permissions_that_any_new_file_has_and_keeps_those_it_had(path):
    write_tensors(path, TENSORS, {})
    usual = path.parent / "usual"
    usual.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    path.chmod(0o640)
    write_tensors(path, TENSORS, {})
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_what_a_killed_process_left_goes_and_what_is_being_written_stays(path):
    path.parent.mkdir(parents=True)
    names = {"left": f".{path.name}.1.tmp", "running": f".{path.name}.2.tmp", "other": ".other.safetensors.1.tmp"}
    files_of = {kind: path.parent / name for kind, name in names.items()}
    for kind, file in files_of.items():
        file.touch()
        if kind != "running":
            os.utime(file, (time.time() - 2 * files.ABANDONED,) * 2)
    write_tensors(path, TENSORS, {})
    assert {kind for kind, file in files_of.items() if file.exists()} == {"running", "other"}


def test_a_header_that_is_nested_without_end_is_refused(tmp_path):
    nested = tmp_path / "nested.safetensors"
    nested.write_bytes(raw_file(b"[" * 200_000))
    with pytest.raises(DamagedFile, match="header is not JSON"):
        read_header(nested)


@pytest.mark.skipif(os.name == "nt", reason="permissions of another kind")
def test_a_file_that_is_read_only_is_replaced_and_stays_so(path):
    write_tensors(path, TENSORS, {"which": "old"})
    path.chmod(0o444)
    write_tensors(path, TENSORS, {"which": "new"})
    assert read_tensors(path)[1] == {"which": "new"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


def test_a_file_system_without_permissions_is_written_to(path, monkeypatch):
    def refuse(self, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    write_tensors(path, TENSORS, {"key": "value"})
    assert read_tensors(path)[1] == {"key": "value"}
