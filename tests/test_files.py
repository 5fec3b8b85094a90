"""Readers name what is wrong with a file; writers leave what was there."""

import errno
import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import dps_lens as dps
from dps_lens import files
from dps_lens.errors import DataError, FileError, RunError, ScoreError
from dps_lens.runs import RunFolder

ROOT = os.geteuid() == 0
RECORD = {"user_id": "u", "id": "d", "title": "A title", "text": "A text."}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no records"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip; unpack it first"),
        (b"PK\x03\x04", "a zip archive"),
        (b"PAR1", "a Parquet file"),
        ("[]".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (b'{"user_id": "\xff"}', "not UTF-8 text .invalid start byte at byte 13"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"user_id": ' + b"1" * 5000 + b"}", "line 1: Exceeds the limit"),
        (b'{"user_id": "\\ud800"}', "half of a character"),
        (b'{"user_id": "a", "user_id": "b"}', "field 'user_id' stands twice"),
        (b'{"user_id": "a"', "line 1: not valid JSON at character .*is it cut off"),
        (b"<html>", "not valid JSON"),
        (b'"text"', "expected an object, found str"),
        (b"[1]", "expected an object, found int"),
        (b'{"profile": 3, "input": "x", "output": "y", "user_id": "u"}', "field 'profile' is int"),
        (b'{"user_id": "u", "title": [], "text": {}}\n' * 3, "field 'title' is list"),
    ],
)
def test_users_files_that_are_none(content, message, tmp_path):
    file = tmp_path / "users.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"users.jsonl.*{message}"):
        dps.load_users(file)


def test_records_in_memory_are_read_as_strictly():
    inside = dict(RECORD)
    inside["more"] = inside
    for source, message in (
        ([RECORD | {"text": "\ud800"}], "list, record 0: a text holds half of a character"),
        ([inside], "list, record 0: it is nested too deeply, or inside itself"),
        (None, "NoneType is no source"),
        (3, "int is no source"),
        (RECORD, "dict is no source"),
    ):
        with pytest.raises(DataError, match=message):
            dps.load_users(source)


def test_places_that_hold_no_file(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for place, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "loop", "there is no file"),
        (tmp_path / ("x" * 300), "there is no file"),
        ("[" * 5000, "there is no file"),
        ("a\0b", "there is no file"),
    ):
        with pytest.raises(DataError, match=message):
            dps.load_users(place)
        with pytest.raises(dps.DPSLensError):
            dps.HeadScores.load(place)


@pytest.mark.skipif(ROOT, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    file = tmp_path / "users.jsonl"
    file.write_text("[]")
    file.chmod(0)
    with pytest.raises(DataError, match="users.jsonl cannot be read .Permission denied"):
        dps.load_users(file)


def failing(number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "make room and run the same again"),
        (errno.EDQUOT, "make room"),
        (errno.EROFS, "name a place that may be written to"),
        (errno.EIO, "mend that and run the same again"),
    ],
)
@pytest.mark.parametrize("where", ["os.replace", "tempfile.mkstemp"])
def test_a_write_that_fails_leaves_the_old_file(number, fix, where, tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    files.write_json(file, {"old": 1})
    monkeypatch.setattr(where, failing(number))
    with pytest.raises(
        FileError, match=f"a.json could not be written .*what was there before is kept; {fix}"
    ) as caught:
        files.write_json(file, {"new": 2})
    assert isinstance(caught.value, OSError)
    monkeypatch.undo()
    assert json.loads(file.read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"], "no temporary file is left"


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.txt"
    files.write_text(file, "old")

    def interrupted():
        with files.replacing(file) as new:
            new.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for place, message in (
        (tmp_path / "file" / "a.txt", "a file stands where a folder is needed"),
        (tmp_path / "folder", "could not be written .Is a directory"),
        (tmp_path / "loop" / "a.txt", "could not be written"),
        (tmp_path / ("x" * 300), "use a shorter name"),
    ):
        with pytest.raises(FileError, match=message):
            files.write_text(place, "new")
    with pytest.raises(FileError, match="a file stands where a folder is needed"):
        files.append_line(tmp_path / "file" / "a.txt", "new")
    with pytest.raises(FileError, match="a file stands where a folder is needed"):
        RunFolder(tmp_path / "file", {})


def test_results_are_ordinary_files(tmp_path):
    files.write_text(tmp_path / "a.txt", "a")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) & 0o600 == 0o600


def tensors():
    return {
        "half": torch.arange(3, dtype=torch.bfloat16),
        "one": torch.tensor(2.0),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }


def test_tensors_come_back_byte_for_byte(tmp_path):
    files.write_tensors(tmp_path / "t.safetensors", tensors(), {"unit": "u"})
    read, plain = files.read_tensors(tmp_path / "t.safetensors"), load_file(tmp_path / "t.safetensors")
    assert read.keys() == plain.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == plain[name].dtype == tensor.dtype


def test_every_flipped_bit_of_a_tensor_file_is_noticed(tmp_path):
    file = tmp_path / "t.safetensors"
    files.write_tensors(file, {"a": torch.tensor([1.0, -2.5]), "b": torch.tensor([3])})
    whole = file.read_bytes()
    for at in range(len(whole)):
        for bit in (0, 6):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                read = files.read_tensors(file)
            except ScoreError:
                continue
            # A space in the padding of the header, or the name of what nobody reads.
            assert {name: one.tolist() for name, one in read.items()} == {"a": [1.0, -2.5], "b": [3]}, (at, bit)


def test_files_without_a_digest_are_read(tmp_path):
    save_file(tensors(), tmp_path / "t.safetensors")
    assert files.read_tensors(tmp_path / "t.safetensors").keys() == tensors().keys()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: (2**63).to_bytes(8, "little") + data[8:],
        lambda data: (2**40).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b'"F32"', b'"F99"'),
        lambda data: data.replace(b'"F32"', b'"I32"'),
        lambda data: data.replace(b"[2]", b"[9]"),
        lambda data: data.replace(b'"a"', b'"b"'),
    ],
)
def test_hostile_tensor_files_are_refused(tmp_path, damage):
    file = tmp_path / "t.safetensors"
    files.write_tensors(file, {"a": torch.tensor([1.0, 2.0])})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ScoreError, match="t.safetensors is (not a whole safetensors file|damaged)"):
        files.read_tensors(file)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"3", b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_a_damaged_run_folder_says_so(content, tmp_path):
    RunFolder(tmp_path, {"a": 1}).put("u", {"x": torch.ones(1)})
    (tmp_path / "made.json").write_bytes(content)
    assert RunFolder(tmp_path, {"a": 1}).made.keys() == {"dps_lens", "command", "date"}
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(RunError, match="run.json.*use another folder, or --force"):
        RunFolder(tmp_path, {"a": 1})
    with pytest.raises(RunError, match="is no run folder"):
        dps.merge_runs([tmp_path], tmp_path / "out")
