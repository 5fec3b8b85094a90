"""What goes wrong is told, loses nothing, and stays with whoever caused it."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from served import SETS, ask, generated, profiles_of

import dps_lens as dps
from dps_lens.errors import DataError, FileError, SteeringError
from dps_lens.serving import Keys, Limits, ProfileStore, Served, SteeringProfile, add_key, make_server, model_of
from dps_lens.serving.engine import BusyError, Engine, Job, StoppingError
from dps_lens.serving.run import check_host
from dps_lens.steering.continuous import Writing
from dps_lens.steering.plan import plan_of

WRONG = {
    "no JSON": ({"content": b"{"}, 400, "JSON"),
    "no object": ({"json": []}, 400, "dictionary"),
    "no messages": ({"json": {"model": "tiny"}}, 400, "messages"),
    "empty messages": ({"messages": []}, 400, "messages"),
    "empty text": ({"messages": [{"role": "user", "content": " "}]}, 400, "empty"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
    "the last is the assistant's": ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "assistant"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "content"),
    "another model": ({"model": "gpt"}, 404, "tiny"),
    "tokens": ({"max_tokens": 65}, 400, "64"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "text for a number": ({"temperature": "1"}, 400, "temperature"),
    "temperature": ({"temperature": -1}, 400, "temperature"),
    "NaN": ({"content": b'{"model": "tiny", "temperature": NaN}'}, 400, ""),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools"),
    "an unknown field": ({"frequency": 1}, 400, "leave it out"),
    "an unknown field of dps": ({"dps": {"head": "L1H1"}}, 400, "leave it out"),
    "a head": ({"dps": {"heads": "L9H1"}}, 400, "L9H1"),
    "no head": ({"dps": {"heads": "first"}}, 400, "first"),
    "a rule": ({"dps": {"rule": "magic"}}, 400, "magic"),
    "no heads for a rule": ({"dps": {"rule": "dps-js", "heads": ""}}, 400, "needs heads"),
    "no documents": ({"dps": {"rule": "cad"}}, 400, "documents"),
    "a strength": ({"dps": {"heads": "L1H1", "gamma": -2}}, 400, "gamma"),
    "a strength that overflows": ({"dps": {"heads": "L1H1", "gamma": 3.4e38}}, 400, "infinite"),
    "both caps": ({"dps": {"heads": "L1H1", "max_kl": 1, "target_kl": 1}}, 400, "not both"),
    "a user": ({"dps": {"user": "nobody"}}, 404, "nobody"),
    "a path": ({"dps": {"user": "../../etc/passwd"}}, 404, "passwd"),
    "no vector": ({"dps": {"user": "ann", "vector": "bob", "rule": "head_vector"}}, 400, "no vector"),
    "too long a name": ({"dps": {"user": "x" * 201}}, 400, "dps.user"),
    "half a character": (
        {"content": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'},
        400,
        "",
    ),
    "too many texts": ({"n": 9}, 400, "n"),
    "too many stops": ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
    "a strength of nothing": ({"dps": {"gamma": 2}}, 400, "does not look at it"),
    "heads of nothing": ({"dps": {"rule": "cad", "heads": "L1H1", "documents": ["x"]}}, 400, "does not look at it"),
    "a cap of nothing": ({"dps": {"rule": "greedy", "max_kl": 1}}, 400, "does not look at it"),
    "a cap of a vector": ({"dps": {"user": "eve", "max_kl": 1}}, 400, "max_kl"),
    "a prompt of completions": ({"dps": {"negative_prompt": "x"}}, 400, "negative_prompt"),
    "likeliest of nothing": ({"top_logprobs": 2}, 400, "top_logprobs"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "a name": ({"messages": [{"role": "user", "content": "x", "name": "ann"}]}, 400, "name"),
    "a context": ({"messages": [{"role": "user", "content": "bread " * 3000}]}, 400, "context"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_told_what_is_wrong(web, name):
    fields, status, words = WRONG[name]
    if {"content", "json"} & {*fields}:
        answer = web.post("/v1/chat/completions", headers={"content-type": "application/json"}, **fields)
    else:
        answer = ask(web, **fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {*error} == {"message", "type", "param", "code"}
    assert words in error["message"]
    assert ask(web, max_tokens=1).status_code == 200


def test_an_error_in_a_stream_has_its_status(web):
    answer = ask(web, stream=True, dps={"heads": "L9H9"})
    assert answer.status_code == 400
    assert "L9H9" in answer.json()["error"]["message"]


def test_keys_let_in_who_has_one(guarded):
    assert guarded(None).get("/healthz").status_code == 200
    for name, headers in ((None, {}), (None, {"authorization": "Bearer dps-wrong"}), (None, {"authorization": "x"})):
        answer = guarded(name).get("/v1/models", headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded("all").get("/v1/models").status_code == 200
    kept = guarded.path.read_text()
    assert guarded.path.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in guarded.folder.iterdir())
    with pytest.raises(DataError, match="of all users"):
        add_key(guarded.path, "boss", admin=True, users=["ann"])
    assert not any(key in kept for key in guarded.keys.values())
    with pytest.raises(DataError, match="of the name 'ann'"):
        add_key(guarded.path, "ann")


def test_a_key_steers_only_with_its_own_users(guarded):
    assert ask(guarded("ann"), dps={"user": "ann"}).status_code == 200
    for steer in ({"user": "bob"}, {"user": "ann", "vector": "eve", "rule": "head_vector"}):
        answer = ask(guarded("ann"), dps=steer)
        # Nothing tells whether there is such a user.
        assert answer.status_code == 404
        assert (
            answer.json()["error"]["message"] == f"there is no profile of user {steer.get('vector', steer['user'])!r}"
        )
    assert ask(guarded("all"), dps={"user": "bob"}).status_code == 200


def test_a_large_body_is_refused_before_it_is_read(guarded):
    assert ask(guarded("all"), "x" * 30_000).status_code == 413

    def parts():
        for _ in range(30):
            yield b"x" * 1000

    answer = guarded("all").post("/v1/chat/completions", content=parts())  # of no stated length
    assert answer.status_code == 413


def test_without_keys_only_this_machine_is_answered(web, server):
    assert web.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    assert web.get("/v1/models", headers={"origin": "http://evil.example"}).status_code == 403
    assert web.get("/v1/models", headers={"origin": server.url}).status_code == 200
    assert web.get("/v1/profiles").status_code == 403
    assert web.put("/v1/profiles/ann", json={"user": "ann"}).status_code == 403
    check_host("127.0.0.1", None)
    with pytest.raises(SteeringError, match="can be reached from other machines"):
        check_host("0.0.0.0", None)


NAMES = ["zoë", "..", "../up", "a/b", "a%2Fb", ".hidden", "-rf", "con", "x" * 60, "名前", "a b", "q?x=1#y"]


@pytest.mark.parametrize("name", NAMES)
def test_profiles_of_any_name_are_made_read_and_deleted(guarded, name):
    from urllib.parse import quote

    root, before = guarded("root"), {path.name for path in guarded.folder.parent.rglob("*")}
    address = f"/v1/profiles/{quote(name, safe='').replace('.', '%2E')}"
    made = root.put(address, json={"user": name, "heads": SETS["ann"]})
    assert made.status_code == 200, made.text
    assert made.json()["model"]["n_layers"] == 3
    assert root.get(address).json()["user"] == name
    assert name in [one["user"] for one in root.get("/v1/profiles").json()["data"]]
    new = {path.name for path in guarded.folder.parent.rglob("*")} - before
    assert new == {path.name for path in guarded.folder.iterdir()} - before
    assert len(new) == 1
    assert ask(root, dps={"user": name}).status_code == 200
    assert root.delete(address).json()["deleted"] is True
    assert root.delete(address).status_code == 404
    assert ask(root, dps={"user": name}).status_code == 404
    assert {path.name for path in guarded.folder.parent.rglob("*")} == before


def test_profiles_are_for_admins_and_checked(guarded, model):
    root = guarded("root")
    assert guarded("all").get("/v1/profiles/ann").status_code == 403
    assert guarded("all").delete("/v1/profiles/ann").status_code == 403
    ann = root.get("/v1/profiles/ann").json()
    for change, words in (
        ({"user": "bob"}, "the address of"),
        ({"model": {**ann["model"], "weights": "other"}}, "another model"),
        ({"heads": "L7H0"}, "L7H0"),
        ({"heads": ""}, "names no heads"),
        ({"rule": "head_vector"}, "no vector"),
        ({"rule": "magic"}, "magic"),
        ({"gamma": "strong"}, "gamma"),
        ({"gamma": -5}, "gamma"),
        ({"max_kl": -1}, "max_kl"),
        ({"task": "lamp-9"}, "lamp-9"),
        ({"documents": [{"id": "1", "fields": {}}]}, "lacks the field"),
        ({"vector": {"heads": "L0H1", "values": [[1.0]]}, "rule": "head_vector"}, ""),
        ({"secret": 1}, "secret"),
    ):
        answer = root.put("/v1/profiles/ann", json={**ann, **change})
        assert answer.status_code == 400, change
        assert words in answer.json()["error"]["message"]
    assert root.get("/v1/profiles/ann").json() == ann


def test_a_profile_of_another_model_steers_nothing(guarded):
    path = ProfileStore(guarded.folder).path("bob")
    kept = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(kept), "model": {"name": "other"}}))
        answer = ask(guarded("all"), dps={"user": "bob"})
        assert answer.status_code == 400
        assert "made with another model" in answer.json()["error"]["message"]
        path.write_text(kept[:-30])
        answer = ask(guarded("all"), dps={"user": "bob"})
        assert answer.status_code == 500
        assert "bob" not in answer.text
        assert "bob" in [one["user"] for one in guarded("root").get("/v1/profiles").json()["data"]]
        assert guarded("root").delete("/v1/profiles/bob").status_code == 200
    finally:
        path.write_text(kept)


@pytest.fixture
def slowly(app, monkeypatch):
    """The server's engine, whose steps take a twentieth of a second; and how many there were."""
    engine, steps = app.state.engine, []
    real = engine._batch.step

    def step():
        steps.append(time.sleep(0.05))
        return real()

    monkeypatch.setattr(engine._batch, "step", step)
    return engine, steps


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_leaves_the_batch(web, server, slowly, stream):
    engine, steps = slowly
    body = {"model": "tiny", "prompt": "The", "max_tokens": 64, "n": 2, "temperature": 2, "stream": stream}
    if stream:
        with httpx.Client(base_url=server.url) as other, other.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    else:
        port, text = int(server.url.rpartition(":")[2]), json.dumps(body)
        with socket.create_connection(("127.0.0.1", port)) as line:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            line.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n{text}".encode())
            wait_for(lambda: len(steps) > 3)
    wait_for(lambda: not engine.rows and not engine.waiting)
    assert 0 < len(steps) < 40  # of the 64 that its texts would have taken
    assert ask(web, max_tokens=1).status_code == 200


def test_one_prompt_that_fails_ends_the_others(web, slowly):
    engine, steps = slowly
    answer = ask(web, path="/v1/completions", text=["The bread", "The night", "bread " * 3000], max_tokens=60)
    assert answer.status_code == 400
    time.sleep(0.2)  # the first two may just have been let in
    wait_for(lambda: not engine.rows and not engine.waiting)
    assert len(steps) < 30


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_that_wait_for_each_other_lose_nothing(model, stream):
    """Of several prompts in a batch of one row, each is answered when the one before it has ended."""
    prompts = ["The bread", "In the beginning", "Nobody"]
    own = [generated(model, prompt, rule="greedy").texts[0] for prompt in prompts]
    with Served(make_server(model, name="tiny", limits=Limits(rows=1))) as server, httpx.Client(timeout=60) as web:
        body = {"model": "tiny", "prompt": prompts, "max_tokens": 12, "temperature": 0, "stream": stream}
        answer = web.post(f"{server.url}/v1/completions", json=body)
    if stream:
        texts = [""] * 3
        for line in answer.text.splitlines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                texts[choice["index"]] += choice["text"]
    else:
        texts = [choice["text"] for choice in answer.json()["choices"]]
    assert texts == own


def test_a_text_that_cannot_be_read_ends_alone(web, app, monkeypatch):
    """What goes wrong with one answer is told to one."""
    from dps_lens.serving.answer import Reader

    real = Reader.pieces

    def pieces(self):
        if self.writing.plan.max_new_tokens == 7:
            raise UnicodeError("unreadable")
        return real(self)

    monkeypatch.setattr(Reader, "pieces", pieces)
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.setdefault(n, ask(web, max_tokens=n, temperature=1).status_code))
        for n in (7, 20)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == {7: 500, 20: 200}
    wait_for(lambda: not app.state.engine.rows)


def test_profiles_are_read_while_others_are_written(web, slowly):
    """Hooks come and go on the model while it runs; a profile is of this model all the time."""
    _engine, steps = slowly
    running = threading.Thread(target=lambda: ask(web, max_tokens=40, n=2, temperature=1))
    running.start()
    wait_for(lambda: len(steps) > 2)
    answers = [ask(web, max_tokens=1, dps={"user": "ann"}).status_code for _ in range(8)]
    running.join()
    assert answers == [200] * 8


class Slow:
    """An engine whose passes take as long as they are told."""

    def __init__(self, model, limits=None):
        self.engine, self.go = Engine(model, limits), threading.Event()
        real = self.engine._batch.step

        def step():
            self.go.wait(20)
            return real()

        self.engine._batch.step = step

    def job(self, model, tokens=4, rule="greedy"):
        events = []
        job = Job(lambda: Writing(plan_of(model, "The bread", rule=rule, max_new_tokens=tokens)), events.append)
        return job, events


def names(events):
    return [type(one).__name__ for one in events]


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_full_queue_says_when_to_come_back(model):
    slow = Slow(model, Limits(waiting=2, rows=1))
    jobs = [slow.job(model) for _ in range(4)]
    slow.engine.submit([jobs[0][0]])
    wait_for(lambda: names(jobs[0][1]) == ["Started"])
    slow.engine.submit([jobs[1][0], jobs[2][0]])
    with pytest.raises(BusyError, match="2 requests are waiting") as refused:
        slow.engine.submit([jobs[3][0]])
    assert refused.value.seconds >= 1
    slow.go.set()
    wait_for(lambda: all(names(events)[-1:] == ["Done"] for _, events in jobs[:3]))
    slow.engine.close()
    assert not slow.engine.running
    with pytest.raises(StoppingError):
        slow.engine.submit([jobs[3][0]])


def test_a_request_that_takes_too_long_is_told_so(model):
    slow = Slow(model, Limits(seconds=0.2))
    job, events = slow.job(model, tokens=50)
    slow.engine.submit([job])
    time.sleep(0.4)
    slow.go.set()
    wait_for(lambda: names(events)[-1:] == ["Failed"])
    assert "longer than 0.2 seconds" in str(events[-1].error)
    wait_for(lambda: slow.engine.rows == 0)
    slow.engine.close()


def test_closing_finishes_what_is_written(model):
    slow = Slow(model)
    job, events = slow.job(model)
    slow.engine.submit([job])
    closing = threading.Thread(target=slow.engine.close)
    closing.start()
    slow.go.set()
    closing.join(20)
    assert names(events)[-1] == "Done"


def test_a_bug_in_the_engine_is_told_and_survived(model):
    slow = Slow(model)
    slow.go.set()
    slow.engine._batch.step = lambda: 1 / 0
    job, events = slow.job(model)
    slow.engine.submit([job])
    wait_for(lambda: names(events)[-1:] == ["Failed"])
    job, events = slow.job(model)  # a batch of its own, without the bug
    slow.engine.submit([job])
    wait_for(lambda: names(events)[-1:] == ["Done"])
    slow.engine.close()


def test_what_can_never_fit_is_refused(model):
    engine = Engine(model, Limits(rows=4, positions=60))
    found = []
    for texts, tokens in ((5, 4), (4, 30), (1, 8)):
        events = []
        make = lambda texts=texts, tokens=tokens: Writing(  # noqa: E731
            plan_of(model, ["The bread"] * texts, rule="greedy", max_new_tokens=tokens)
        )
        engine.submit([Job(make, events.append)])
        wait_for(lambda events=events: names(events)[-1:] in (["Failed"], ["Done"]))
        found.append(names(events)[-1])
    assert found == ["Failed", "Failed", "Done"]
    engine.close()


def test_logs_hold_nothing_of_what_is_said(guarded, caplog):
    caplog.set_level(logging.DEBUG)
    secret = "my neighbour's parrot"
    for fields in ({}, {"stream": True}, {"dps": {"user": "ann", "documents": [secret]}}, {"dps": {"rule": secret}}):
        ask(guarded("ann"), f"Tell of {secret}", **fields)
    guarded("root").put("/v1/profiles/zoe", json={"user": "zoe", "heads": secret})

    def said():
        found = [one.getMessage() for one in caplog.records if one.name.startswith(("dps_lens", "uvicorn", "fastapi"))]
        return found, [json.loads(one) for one in found if one.startswith("{")]

    wait_for(lambda: "root" in {one["key"] for one in said()[1]})  # a line is written when its answer has been sent
    ours, lines = said()
    assert {one["key"] for one in lines} == {"ann", "root"}
    assert {one["status"] for one in lines} >= {200, 400}
    assert not any("parrot" in one or "zoe" in one for one in ours)


WRITER = """
import sys
from dps_lens.serving import ProfileStore, SteeringProfile
store, heads = ProfileStore(sys.argv[1]), ",".join(f"L{n}H0" for n in range(2000))
print("ready", flush=True)
while True:
    for gamma in (1.0, 2.0):
        store.write(SteeringProfile(user="ann", heads=heads, gamma=gamma))
"""


def test_a_writer_that_is_killed_leaves_a_whole_profile(tmp_path):
    for pause in (0.01, 0.2):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        wait_for((tmp_path / "ann.json").exists)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        store = ProfileStore(tmp_path)
        found = store.read("ann")
        assert len(found.head_set()) == 2000
        assert [*store] == ["ann"]
        assert store.delete("ann")
        assert not [*tmp_path.iterdir()]


def test_a_server_that_is_killed_while_it_streams(tiny_folders, tmp_path):
    """Who listens is cut off, and the next server goes on from the same folder."""
    command = [sys.executable, "-m", "dps_lens", "serve", "--model", tiny_folders["llama"], "--name", "tiny"]
    heard = []
    for _ in range(2):
        ProfileStore(tmp_path).write(SteeringProfile(user="ann", heads=SETS["ann"]))
        arguments = [*command, "--profiles", tmp_path, "--port", "0"]
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
        url = (
            next(line for line in process.stderr if line.startswith("serving"))
            .split()[3]
            .rstrip(";")
            .removesuffix("/v1")
        )
        body = {
            "model": "tiny",
            "prompt": "The",
            "max_tokens": 900,
            "temperature": 1,
            "stream": True,
            "dps": {"user": "ann"},
        }
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            heard.append(next(lines))
            process.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):
                list(lines)
        process.wait()
        process.stderr.close()
    assert all(one.startswith("data: {") for one in heard)
    assert ProfileStore(tmp_path).read("ann").heads == SETS["ann"]
    assert [path.name for path in tmp_path.iterdir()] == ["ann.json"]


def test_a_full_disk_keeps_the_profile_that_was_there(tmp_path, monkeypatch):
    store = ProfileStore(tmp_path)
    store.write(SteeringProfile(user="ann", heads="L0H0"))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(FileError, match="make room"):
            store.write(SteeringProfile(user="ann", heads="L1H1"))
    assert store.read("ann").heads == "L0H0"
    assert [path.name for path in tmp_path.iterdir()] == ["ann.json"]


def test_names_that_a_file_system_does_not_tell_apart(tmp_path, monkeypatch):
    store = ProfileStore(tmp_path)
    store.write(SteeringProfile(user="Ann", heads="L0H0"))
    monkeypatch.setattr(ProfileStore, "path", lambda self, user: self.folder / "Ann.json")
    assert store.read("ann") is None
    assert not store.delete("ann")
    with pytest.raises(DataError, match="another user"):
        store.write(SteeringProfile(user="ann", heads="L1H1"))
    assert store.read("Ann").heads == "L0H0"


def test_profiles_of_runs(model, probe, short):
    from dps_lens.serving import make_profiles

    scores = dps.score_heads(model, probe[:2], max_examples=1, prompt_config=short)
    vectors = dps.head_vectors(model, probe[:3], scores.top(2), prompt_config=short, max_examples=1, n_donors=1)
    made = make_profiles(probe[:2], scores, vectors=vectors, k=3, own=True, documents=True, gamma=0.5)
    for user, one in zip(probe[:2], made, strict=True):
        one.check(model, model_of(model))
        assert one.head_set().heads == scores.top(3, user.id).heads
        assert (one.head_vector().values == vectors[user.id].values).all()
        assert [each.fields for each in one.history()] == [dict(each.fields) for each in user.history]
        assert one.model["weights"]
    with pytest.raises(SteeringError, match="has no vector"):
        make_profiles(probe[:4], scores, vectors=vectors)
    with pytest.raises(SteeringError, match="give heads, vectors"):
        make_profiles(probe[:2])


def test_a_kept_profile_steers_as_the_run_did(model, tmp_path):
    """From a file, through JSON, to the last digit."""
    store = ProfileStore(tmp_path)
    for one in profiles_of(model):
        store.write(one)
        again = store.read(one.user)
        assert again.model_dump(exclude={"made"}) == one.model_dump(exclude={"made"})
    vector = store.read("eve").head_vector()
    prompt = dps.chat_prompt(model, "Bread?")
    own = generated(model, prompt, rule="head_vector", vectors=profiles_of(model)[2].head_vector())
    assert generated(model, prompt, rule="head_vector", vectors=vector).tokens[0].tolist() == own.tokens[0].tolist()


def test_a_server_that_is_stopped_finishes_its_answers(model):
    found = {}
    with Served(make_server(model, name="tiny")) as server:
        web = httpx.Client(base_url=server.url, timeout=60)

        def long():
            found["answer"] = ask(web, max_tokens=60, n=4, temperature=1)

        asking = threading.Thread(target=long)
        asking.start()
        time.sleep(0.1)
    asking.join(30)
    web.close()
    assert found["answer"].status_code == 200
    assert len(found["answer"].json()["choices"]) == 4


def test_keys_of_a_file_that_holds_none(tmp_path):
    path = tmp_path / "keys.json"
    blank, open_ = '[{"name": "x", "sha256": ""}]', f'[{{"name": "x", "sha256": "{"0" * 64}", "users": "ann"}}]'
    for text in ("[]", "{}", "[1]", '[{"name": "x"}]', blank, open_, "nothing"):
        path.write_text(text)
        with pytest.raises(DataError):
            Keys.read(path)
