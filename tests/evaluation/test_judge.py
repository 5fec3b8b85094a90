"""The judge against a real HTTP server that speaks the protocol, well and badly."""

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
