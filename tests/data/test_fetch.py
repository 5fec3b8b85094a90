"""Downloads from a real HTTP server: whole, cut off, damaged, or not there."""

import gzip
import json
import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from local_server import Quiet, serving

import dps_lens as dps
from dps_lens.data.fetch import fetch
from dps_lens.errors import DataError, FileError

QUESTION = {
    "id": "1",
    "input": "Generate a headline for the following article: It rained.",
    "profile": [{"id": f"p{index}", "title": f"Title {index}", "text": f"Text {index}."} for index in range(5)],
}
FILES = {
    "/LaMP_4/dev/dev_questions.json": json.dumps([QUESTION]).encode(),
    "/LaMP_4/dev/dev_outputs.json": json.dumps({"task": "LaMP_4", "golds": [{"id": "1", "output": "Rain"}]}).encode(),
    "/LaMP_2/new/dev/dev_questions.json": b"<html>moved</html>",
}
HOSTILE = {
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'[{"id": ' + b"1" * 5000 + b"}]",
    "not text": b"\xff\xfe\x00",
    "numbers": b"[1, 2]",
    "another object": b'{"message": "gone"}',
    "twice": b'[{"id": "1", "id": "2"}]',
}


class Server:
    """Serves `FILES` with ranges; `cut` ends the next answers after so many bytes."""

    def __init__(self):
        self.ranges, self.cut, self.files, self.packed = [], 0, dict(FILES), False
        outer = self

        class Handler(Quiet):
            def do_GET(self):
                data = outer.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                wanted = self.headers.get("Range")
                outer.ranges.append((self.path, wanted))
                start = int(re.match(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                if outer.packed:
                    self.send_header("Content-Encoding", "gzip")
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(data[start : start + outer.cut] if outer.cut else data[start:])
                    self.close_connection = True

        self.handler = Handler


@pytest.fixture
def server():
    found = Server()
    with serving(found.handler) as address:
        found.url = address
        yield found


@pytest.fixture(autouse=True)
def online(monkeypatch):
    """The tests run offline; a server on this machine is still there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_task_is_fetched_once_and_loads(server, tmp_path):
    questions = fetch("lamp-4", to=tmp_path, mirror=server.url)
    (user,) = dps.load_users(questions)
    assert user.examples[0].reference == "Rain"
    assert len(server.ranges) == 2
    assert fetch("LaMP-4", to=tmp_path, mirror=server.url) == questions
    assert len(server.ranges) == 2, "both are there"
    assert not list(tmp_path.glob("*.part"))


def test_a_download_goes_on_where_it_stopped(server, tmp_path):
    part = tmp_path / "dev_questions.json.part"
    part.write_bytes(FILES["/LaMP_4/dev/dev_questions.json"][:40])
    questions = fetch("lamp-4", to=tmp_path, mirror=server.url)
    assert server.ranges[0] == ("/LaMP_4/dev/dev_questions.json", "bytes=40-")
    assert questions.read_bytes() == FILES["/LaMP_4/dev/dev_questions.json"]


def test_a_connection_that_breaks_loses_at_most_a_piece(server, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 16)
    server.cut = 50
    with suppress(DataError):  # the client itself goes on a few times
        fetch("lamp-4", to=tmp_path, mirror=server.url)
    server.cut = 0
    questions = fetch("lamp-4", to=tmp_path, mirror=server.url)
    assert questions.read_bytes() == FILES["/LaMP_4/dev/dev_questions.json"]
    starts = [int(asked[6:-1]) for path, asked in server.ranges if asked and path.endswith("questions.json")]
    assert starts
    assert min(starts) == 48, "three pieces of 16 bytes came"


def test_a_damaged_file_is_fetched_again(server, tmp_path):
    questions = fetch("lamp-4", to=tmp_path, mirror=server.url)
    whole = questions.read_bytes()
    questions.write_bytes(whole[:-30])
    fetch("lamp-4", to=tmp_path, mirror=server.url)
    assert questions.read_bytes() == whole
    assert len(server.ranges) == 3


def test_what_cannot_be_fetched_says_why(server, tmp_path):
    with pytest.raises(DataError, match="is not JSON"):
        fetch("lamp-2", to=tmp_path, mirror=server.url)
    assert not list(tmp_path.iterdir()), "nothing that would load later"
    with pytest.raises(DataError, match=r"LaMP_3/dev/dev_questions.json could not be read .*404"):
        fetch("lamp-3", to=tmp_path, mirror=server.url)
    with pytest.raises(DataError, match="could not be read .*run the same again to go on, or put the files there"):
        fetch("lamp-4", to=tmp_path, mirror="http://127.0.0.1:9")
    for name, split in (("lamp-8", "dev"), ("lamp-4", "test"), ("longlamp", "dev")):
        with pytest.raises(DataError, match="use lamp-1 to lamp-7, 'dev' or 'train'"):
            fetch(name, split=split, to=tmp_path)


def test_a_fetched_task_loads_by_name(server, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "dps_lens", "fetch", "lamp-4", "--mirror", server.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("data/lamp-4/dev_questions.json")
    load = "import dps_lens as dps; print(dps.load_users('lamp-4')[0].examples[0].reference)"
    loaded = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "Rain"
    empty = environment | {"XDG_CACHE_HOME": str(tmp_path / "empty")}
    missing = subprocess.run([sys.executable, "-c", load], env=empty, capture_output=True, text=True, check=False)
    assert "run: dps-lens fetch lamp-4" in missing.stderr


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_list_of_records_is_not_kept(server, tmp_path, content):
    server.files["/LaMP_4/dev/dev_questions.json"] = content
    with pytest.raises(DataError, match="is not JSON as it is read here"):
        fetch("lamp-4", to=tmp_path, mirror=server.url)
    assert not list(tmp_path.iterdir()), "nothing that would load later"


@pytest.mark.parametrize("packed", [True, False])
def test_a_download_without_end_is_cut_off(server, tmp_path, monkeypatch, packed):
    monkeypatch.setattr("dps_lens.data.fetch.MAX_BYTES", 2**20)
    endless = b" " * (8 * 2**20)
    server.files["/LaMP_4/dev/dev_questions.json"] = gzip.compress(endless) if packed else endless
    server.packed = packed
    with pytest.raises(DataError, match="more than 1048576 bytes came.*run the same again"):
        fetch("lamp-4", to=tmp_path, mirror=server.url)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_what_came(server, tmp_path, monkeypatch):
    from dps_lens.data import fetch as module

    class Full:
        def __init__(self, file):
            self._file = file

        def write(self, data):
            self._file.write(data[:20])
            self._file.flush()
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self._file, name)

    bounded = module._Bounded
    monkeypatch.setattr(module, "_Bounded", lambda file, path: bounded(Full(file), path))
    with pytest.raises(FileError, match="dev_questions.json.part could not be written .No space left.*make room"):
        fetch("lamp-4", to=tmp_path, mirror=server.url)
    monkeypatch.undo()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    questions = fetch("lamp-4", to=tmp_path, mirror=server.url)
    assert server.ranges[1] == ("/LaMP_4/dev/dev_questions.json", "bytes=20-")
    assert questions.read_bytes() == FILES["/LaMP_4/dev/dev_questions.json"]


def test_a_place_that_is_none_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file could not be written .*a file stands where a folder is needed"):
        fetch("lamp-4", to=tmp_path / "file", mirror=server.url)
    (tmp_path / "folder" / "dev_questions.json").mkdir(parents=True)
    with pytest.raises(FileError, match="dev_questions.json could not be written"):
        fetch("lamp-4", to=tmp_path / "folder", mirror=server.url)


@pytest.mark.parametrize("sums", [b"", b"[]", b"{", b"\xff", b'{"dev_questions.json": 1}', b"[" * 100_000])
def test_damaged_sums_mean_a_download(server, tmp_path, sums):
    fetch("lamp-4", to=tmp_path, mirror=server.url)
    (tmp_path / "sha256.json").write_bytes(sums)
    fetch("lamp-4", to=tmp_path, mirror=server.url)
    assert len(server.ranges) == 4
