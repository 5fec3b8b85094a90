"""The judge against a real HTTP server that speaks the protocol, well and badly."""

import gzip
import json
import re
import time
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
from local_server import Quiet, serving

import dps_lens as dps
from dps_lens.errors import EvaluationError
from dps_lens.evaluation import Evaluation, Verdicts
from dps_lens.evaluation.endpoint import MAX_REPLY
from dps_lens.evaluation.judge import CRITERIA, read_reply

FORM = dict.fromkeys(CRITERIA, "tie")


class Server:
    """A chat endpoint on this machine; `reply` makes the answer of a conversation, or a status with a delay."""

    def __init__(self):
        self.asked, self.reply = [], lambda messages: json.dumps(FORM)
        outer = self

        class Handler(Quiet):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                found = outer.reply(body["messages"])
                status, content = found if isinstance(found, tuple) else (200, found)
                choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
                answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
                answer |= {
                    "choices": [choice],
                    "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
                }
                data = json.dumps(answer if status == 200 else {"error": {"message": content}}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(BrokenPipeError):  # who timed out has hung up
                    self.wfile.write(data)

        self.handler = Handler


@pytest.fixture
def server():
    found = Server()
    with serving(found.handler) as address:
        found.url = address + "/v1"
        yield found


@pytest.fixture
def endpoint(server, tmp_path):
    return dps.Endpoint("judge", base_url=server.url, cache=tmp_path / "calls", timeout=5.0, retries=0)


@pytest.fixture
def answered(probe):
    """Two users, two examples each; `long` writes more than `rag`, `same` writes the same."""
    rows = []
    for user in probe[:2]:
        for example in user.examples[-2:]:
            about = {"user": user.id, "example": example.id, "reference": example.reference}
            for method, text in (("rag", "A text."), ("long", f"A longer text, {example.id}."), ("same", "A text.")):
                rows.append(about | {"method": method, "text": text})
            rows.append(about | {"method": "reference", "text": example.reference})
    return Evaluation(pd.DataFrame(rows), pd.DataFrame(), pd.DataFrame(), probe[0].task)


def answers_in(messages):
    asked = messages[1]["content"]
    return re.search(r"Answer A:\n(.*?)\n\nAnswer B:\n(.*?)\n\nSay for every", asked, re.DOTALL).groups()


def longer(messages):
    a, b = answers_in(messages)
    return json.dumps(dict.fromkeys(CRITERIA, "A" if len(a) > len(b) else "B"))


def run(answered, probe, endpoint, **options):
    return dps.judge(answered, probe[:2], endpoint, **options)


def test_a_fair_judge(server, endpoint, answered, probe):
    server.reply = longer
    found = run(answered, probe, endpoint)
    table = found.to_frame().set_index(["method", "criterion"])
    assert table.loc[("long", "style"), "mean"] == 1.0
    assert table.loc[("long", "style"), "agreement"] == 1.0
    assert table.loc[("same", "style"), "mean"] == 0.0
    assert np.isnan(table.loc[("same", "style"), "agreement"]), "never asked about"
    assert found.position_bias()["mean"] == 0.0
    assert len(server.asked) == endpoint.calls == 4 * 2, "four pairs in both orders; equal answers are not asked about"
    for body in server.asked:
        assert body["temperature"] == 0
        asked = body["messages"][1]["content"]
        assert "rag" not in asked.split("Answer A")[1], "the judge is told no names"
        assert "long," not in asked
    user = probe[0]
    asked = [body["messages"][1]["content"] for body in server.asked]
    own = [one for one in asked if user.examples[-1].input.strip() in one]
    assert len(own) == 2
    assert {answers_in([0, {"content": asked}])[0] for asked in own} == {
        "A text.",
        f"A longer text, {user.examples[-1].id}.",
    }
    assert all(user.examples[-1].reference not in asked for asked in own)
    assert any(document.fields["title"] in own[0] for document in user.examples[-1].profile)


def test_a_stated_preference_is_asked_about(server, endpoint, llama):
    rows = [
        {
            "preference": f"I avoid loud places, {n}.",
            "question": f"Where to eat in Oslo, day {n}?",
            "classification_task_options": ["A calm cafe.", "A bar.", "A club."],
        }
        for n in range(2)
    ]
    users = dps.load_users(rows)
    quiet = dps.RunConfig(progress=False)
    table = dps.evaluate(
        llama.hooked, users, {"plain": "plain", "rag": "rag"}, max_new_tokens=3, metrics=["ROUGE-L"], run_config=quiet
    )
    server.reply = lambda messages: json.dumps(dict.fromkeys([*CRITERIA, "adherence"], "A"))
    found = dps.judge(table, users, endpoint)
    verdicts = found.rows.query("criterion == 'adherence' and asked")["verdict"]
    assert len(verdicts)
    assert verdicts.notna().all()
    asked = server.asked[0]["messages"][-1]["content"]
    assert asked.startswith("About this user:\n- I avoid loud places")
    assert "adherence: which answer keeps to what the person is known to want" in asked


def test_a_judge_that_prefers_the_first_answer_decides_nothing(server, endpoint, answered, probe):
    server.reply = lambda messages: "Of course! " + json.dumps(dict.fromkeys(CRITERIA, "A"))
    found = run(answered, probe, endpoint, methods=["long"])
    table = found.to_frame().set_index("criterion")
    assert table.loc["fluency", "mean"] == 0.0
    assert table.loc["fluency", "agreement"] == 0.0
    assert found.position_bias()["mean"] == 1.0
    assert run(answered, probe, endpoint).position_bias()["mean"] == 1.0, "free ties do not dilute it"


def test_replies_that_are_not_valid_are_asked_for_again(server, endpoint, answered, probe):
    def second(messages):
        return longer(messages) if len(messages) == 4 else "I like A better"

    server.reply = second
    found = run(answered, probe, endpoint, methods=["long"])
    assert found.to_frame()["mean"].tolist() == [1.0] * len(CRITERIA)
    assert len(server.asked) == 16
    assert "not the JSON object" in server.asked[-1]["messages"][3]["content"]


def test_a_judge_without_a_valid_reply_counts_as_none(server, endpoint, answered, probe):
    server.reply = lambda messages: json.dumps({"relevance": "C"})
    found = run(answered, probe, endpoint, methods=["long"], attempts=2)
    table = found.to_frame()
    assert table["invalid"].tolist() == [1.0] * len(CRITERIA)
    assert table["mean"].isna().all()
    assert len(server.asked) == 8 * 2


@pytest.mark.parametrize("status", [429, 500])
def test_failed_calls_are_tried_again(server, answered, probe, tmp_path, status):
    failed = []

    def at_first(messages):
        if len(failed) < 2:
            failed.append(1)
            return status, "later"
        return longer(messages)

    server.reply = at_first
    patient = dps.Endpoint("judge", base_url=server.url, cache=tmp_path, retries=3)
    found = run(answered, probe, patient, methods=["long"])
    assert found.to_frame()["mean"].min() == 1.0
    assert patient.calls == 8
    assert len(server.asked) == 10


def test_nothing_that_was_paid_for_is_lost(server, endpoint, answered, probe):
    """The judge dies after three calls; the next run pays for the rest only, and gives the same verdicts."""
    counted = []

    def dies(messages):
        counted.append(1)
        return longer(messages) if len(counted) <= 3 else (401, "go away")

    server.reply = dies
    with pytest.raises(EvaluationError, match=r"gave no answer \(AuthenticationError.*run the same again to go on"):
        run(answered, probe, endpoint, methods=["long"])
    kept = sorted(endpoint.cache.glob("*.json"))
    assert len(kept) == 3
    assert json.loads(kept[0].read_text())["usage"]["total_tokens"] == 12
    server.reply = longer
    found = run(answered, probe, endpoint, methods=["long"])
    assert endpoint.calls == 8
    assert len(server.asked) == 4 + 5
    again = run(answered, probe, endpoint, methods=["long"])
    assert len(server.asked) == 9
    pd.testing.assert_frame_equal(again.rows, found.rows)


def test_a_slow_judge_times_out(server, answered, probe, tmp_path):
    server.reply = lambda messages: time.sleep(2) or "{}"
    hasty = dps.Endpoint("judge", base_url=server.url, cache=tmp_path, timeout=0.2, retries=0)
    with pytest.raises(EvaluationError, match="APITimeoutError"):
        run(answered, probe, hasty)
    nobody = dps.Endpoint("judge", base_url="http://127.0.0.1:9/v1", cache=tmp_path, retries=0)
    with pytest.raises(EvaluationError, match=r"http://127.0.0.1:9/v1 gave no answer \(APIConnectionError"):
        run(answered, probe, nobody)


def test_a_budget_ends_the_run_with_what_is_done(server, answered, probe, tmp_path):
    server.reply = longer
    poor = dps.Endpoint("judge", base_url=server.url, cache=tmp_path, max_calls=5)
    with pytest.warns(UserWarning, match="5 calls were made, as many as max_calls allows"):
        found = run(answered, probe, poor, methods=["long"])
    assert found.unfinished == 2, "nothing after it, free ties neither"
    assert len(found.rows) == 2 * 2 * len(CRITERIA)
    richer = dps.Endpoint("judge", base_url=server.url, cache=tmp_path)
    assert run(answered, probe, richer, methods=["long"]).unfinished == 0
    assert richer.calls == 3


def test_intervals_are_over_users():
    rows = [("a", "1", 1), ("a", "2", 1), ("b", "1", 0), ("c", "1", -1)]
    frame = pd.DataFrame(
        [
            {
                "user": u,
                "example": e,
                "method": "m",
                "criterion": "style",
                "first": first,
                "asked": True,
                "verdict": float(value),
            }
            for u, e, value in rows
            for first in (1, 0)
        ]
    )
    (row,) = Verdicts(frame, 0).to_frame().to_dict("records")
    assert row["mean"] == 0.0
    assert row["high"] == pytest.approx(4.302653 * 1 / np.sqrt(3), rel=1e-5)
    assert row["agreement"] == 1.0
    empty = Verdicts(frame[:0], 4)
    assert np.isnan(empty.position_bias()["mean"])


@pytest.mark.parametrize(
    "reply",
    [
        '{"relevance": ' + "1" * 5000 + "}",
        '{"a":' * 100_000 + "}",
        "[" * 100_000 + "]" * 100_000,
        json.dumps(FORM)[:-1] + ', "style": "A"}',
        json.dumps({**FORM, "note": "\ud800"}),
        json.dumps({name: ["A"] for name in CRITERIA}),
    ],
    ids=["5000 digits", "nested", "lists", "style twice", "half a character", "lists for words"],
)
def test_hostile_replies_are_no_verdict(reply):
    assert read_reply(reply, CRITERIA) is None


@pytest.mark.parametrize(
    "reply", ["", "{}", "[1]", '{"style": "A"}', "{'style': 'A'}", '{"a": {"b": 1}', json.dumps({**FORM, "style": "a"})]
)
def test_what_is_no_verdict(reply):
    assert read_reply(reply, CRITERIA) is None


def test_verdicts_in_the_midst_of_words():
    assert read_reply(f"Well:\n```json\n{json.dumps(FORM, indent=1)}\n```", CRITERIA) == FORM


def test_bad_input_says_what_to_do(endpoint, answered, probe, monkeypatch, tmp_path):
    with pytest.raises(EvaluationError, match="'nothing' is not among rag, long"):
        run(answered, probe, endpoint, against="nothing")
    with pytest.raises(EvaluationError, match="is not among the users"):
        dps.judge(answered, probe[:1], endpoint)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(EvaluationError, match="OPENAI_API_KEY"):
        dps.Endpoint("gpt", cache=tmp_path).ask([{"role": "user", "content": "?"}])


class Raw:
    """A server that sends bytes as they are: `send(handler)` writes the whole reply."""

    def __init__(self):
        self.asked = 0
        outer = self

        class Handler(Quiet):
            def do_POST(self):
                outer.asked += 1
                self.rfile.read(int(self.headers["Content-Length"]))
                with suppress(OSError):  # who has read enough hangs up
                    outer.send(self)

        self.handler = Handler


@pytest.fixture
def raw(tmp_path):
    found = Raw()
    with serving(found.handler) as address:
        found.endpoint = dps.Endpoint(
            "judge", base_url=f"{address}/v1", cache=tmp_path / "calls", timeout=2.0, retries=0
        )
        yield found


def sending(data, status=200, kind="application/json", **headers):
    def send(handler):
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return send


def reply_of(message):
    return sending(json.dumps({"choices": [{"index": 0, "message": message}]}).encode())


ASK = [{"role": "user", "content": "?"}]
BOMB = gzip.compress(b'{"choices": [], "filler": "' + b" " * (MAX_REPLY + 2**20) + b'"}')


@pytest.mark.parametrize(
    ("send", "message"),
    [
        (sending(b"<html>502 Bad gateway</html>", kind="text/html"), "no reply of a chat model"),
        (sending(b"<html>moved</html>", 503, "text/html"), "InternalServerError"),
        (sending(b'{"choices": [{"message": {"content": "x"'), "no reply of a chat model"),
        (sending(b'{"object": "chat.completion"}'), "choices"),
        (sending(b'{"choices": {"0": "x"}}'), "choices"),
        (sending(b'{"choices": [{"message": {"content": ["x"]}}]}'), "content"),
        (sending(b"[" * 200_000), "no reply of a chat model"),
        (sending(b"\xff\xfe\x00"), "no reply of a chat model"),
        (sending(b""), "no reply of a chat model"),
        (sending(BOMB, Content_Encoding="gzip"), "more than 16777216 bytes"),
        (sending(BOMB, 500, Content_Encoding="gzip"), "more than 16777216 bytes"),
        (sending(b"not gzip", Content_Encoding="gzip"), "APIConnectionError"),
        (sending(b"", 307, Location="http://127.0.0.1:9/elsewhere"), "307"),
    ],
    ids=[
        "html", "html error", "cut off", "no choices", "choices are no list", "content is no text", "nested",
        "no text", "nothing", "bomb", "bomb as an error", "not packed", "redirect",
    ],
)  # fmt: skip
def test_what_is_no_reply_is_an_error_and_not_kept(raw, send, message):
    raw.send = send
    with pytest.raises(EvaluationError, match=f"gave no answer .*{message}.*run the same again to go on"):
        raw.endpoint.ask(ASK)
    assert raw.endpoint.calls == 0
    assert not list(raw.endpoint.cache.glob("*"))
    raw.send = reply_of({"role": "assistant", "content": "fine"})
    assert raw.endpoint.ask(ASK) == "fine"


def test_a_reply_that_never_ends_is_cut_off(raw):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    raw.send, begun = drip, time.monotonic()
    with pytest.raises(EvaluationError, match="not whole after 2 seconds"):
        raw.endpoint.ask(ASK)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "message", [{"content": None}, {"content": ""}, {"content": None, "refusal": "I cannot"}, None]
)
def test_an_empty_answer_is_not_kept(raw, message):
    raw.send = reply_of(message) if message else sending(b'{"choices": []}')
    assert raw.endpoint.ask(ASK) == ""
    assert not list(raw.endpoint.cache.glob("*"))
    raw.send = reply_of({"content": "better"})
    assert raw.endpoint.ask(ASK) == raw.endpoint.ask(ASK) == "better"
    assert raw.asked == raw.endpoint.calls == 2


def test_empty_answers_count_as_invalid_and_are_asked_for_again(raw, answered, probe):
    raw.send = reply_of({"content": None})
    found = run(answered, probe, raw.endpoint, methods=["long"], attempts=2)
    assert found.to_frame()["invalid"].tolist() == [1.0] * len(CRITERIA)
    assert raw.asked == 8 * 2
    raw.send = reply_of({"content": json.dumps(FORM)})
    assert run(answered, probe, raw.endpoint, methods=["long"]).to_frame()["invalid"].max() == 0.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-30],
        lambda text: "[]",
        lambda text: text.replace('"fine"', "null"),
        lambda text: text.replace('"fine"', '""'),
        lambda text: text.replace('"fine"', '"wine"'),
        lambda text: text.replace('"?"', '"!"'),
        lambda text: '{"answer": ' + "1" * 5000 + "}",
        lambda text: '{"answer":' * 100_000,
    ],
)
def test_a_damaged_answer_is_asked_for_again(raw, damage):
    raw.send = reply_of({"content": "fine"})
    raw.endpoint.ask(ASK)
    (file,) = raw.endpoint.cache.glob("*.json")
    whole = file.read_text()
    file.write_text(damage(whole))
    assert raw.endpoint.ask(ASK) == "fine"
    assert raw.asked == 2
    assert file.read_text() == whole


def test_numbers_of_any_length_in_the_usage_do_no_harm(raw):
    def replied(digits):
        usage = b'"usage": {"total_tokens": ' + b"1" * digits + b', "prompt_tokens": 3, "completion_tokens": null}'
        return sending(b'{"choices": [{"message": {"content": "fine"}}], ' + usage + b"}")

    raw.send = replied(5000)
    with pytest.raises(EvaluationError, match="number out of range"):
        raw.endpoint.ask(ASK)
    raw.send = replied(100)
    assert raw.endpoint.ask(ASK) == "fine"
    (file,) = raw.endpoint.cache.glob("*.json")
    assert json.loads(file.read_text())["usage"] == {"prompt_tokens": 3}


def test_an_address_that_is_none_is_named(tmp_path):
    for address in ("http://[", "ftp://127.0.0.1/v1", "http://127.0.0.1:99999/v1"):
        with pytest.raises(EvaluationError, match="Endpoint: "):
            dps.Endpoint("judge", base_url=address, cache=tmp_path, retries=0).ask(ASK)
