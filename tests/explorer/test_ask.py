"""The live page is asked: its answers are those of the library calls that it offers, in the page and on the wire."""

import json
import threading
import urllib.error
import urllib.request
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flask import Flask
from pcs import score_pcs
from playwright.sync_api import expect

import dps_lens as dps
from dps_lens.errors import SteeringError
from dps_lens.explorer.ask import Asker
from dps_lens.explorer.code import Origin
from dps_lens.explorer.kept import KeptRuns
from dps_lens.explorer.line import BusyError, Line
from dps_lens.explorer.question import ADDED_BY, STEERED_BY, Refused
from dps_lens.explorer.server import HOST, LivePage, make_app
from dps_lens.heads import HeadSet
from dps_lens.model import runner_of

PROMPT = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=20, response_tokens=6)
EVIL = "<img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def explored(tinies, probe):
    model = tinies("llama").hooked
    scores = score_pcs(model, probe[:4], max_examples=1, prompt_config=PROMPT)
    return dps.explore(model, probe[:4], scores, k=2, gammas=(1.0,), ks=(2,), max_users=2, max_new_tokens=4)


@pytest.fixture
def asker(llama, probe):
    return Asker(llama.hooked, probe[:4], PROMPT)


@pytest.fixture(scope="module")
def url(explored, tinies, probe):
    with LivePage(make_app(tinies("llama").hooked, probe[:4], explored, Origin("# as given"))) as live:
        yield live.url


def request(example, **changed):
    asked = {"user": example.user_id, "prompt": example.input, "text": example.reference, "documents": "",
             "heads": "L1H2,L0H0", "ablation": "zero", "rule": "dps", "gamma": 1.5, "length": 5}  # fmt: skip
    return asked | changed


def measured(asker, asked):
    """The whole of an answer."""
    return {name: value for line in asker.measure(asker.read(asked)) for name, value in line.items()}


def ran(python, model, users):
    """What the offered lines define, run as they are beside `model` and `users`."""
    names = {"model": model, "users": users}
    exec(python, names)
    return names


QUESTIONS = {
    "a shown example": {},
    "own words, a user's profile": {"prompt": "Write a title about rain.", "text": "Rain again"},
    "pasted documents": {"user": "", "documents": "I like short titles.\n\nRain, again and again.", "text": "Rain"},
    "uniform attention": {"ablation": "uniform"},
}


@pytest.mark.parametrize("asked", QUESTIONS.values(), ids=QUESTIONS)
def test_a_measure_is_that_of_the_call_beside_it(asker, llama, probe, asked, capsys):
    asked = request(probe[1].examples[-1], **asked)
    found = measured(asker, asked)
    names = ran(found["python"], llama.hooked, list(probe[:4]))
    capsys.readouterr()
    frame = names["effects"].to_frame()
    full = frame[frame["family"] == "full model"].set_index("measure")["mean"]
    edited = frame[frame["family"] != "full model"].set_index("measure")["mean"]
    rows = {row["measure"]: row for row in found["rows"]}
    assert {"NLL, own", "NLL, no_profile", "NLL, neutral", "gain", "task_cost", "gain_removed"} <= {*rows}
    assert ("necessity_other" in rows) == bool(asked["user"])
    for name, row in rows.items():
        if "value" in row:
            assert row["value"] == pytest.approx(edited[name], abs=1e-6)
        else:
            left = {"gain": "gain_left", "gain_other": "gain_left_other"}.get(name, name)
            assert (row["full"], row["edited"]) == pytest.approx((full[name], edited[left]), abs=1e-6)
    # The same heads once more, and other heads: runs that were kept change nothing.
    assert measured(asker, asked)["rows"] == found["rows"]
    other = measured(asker, asked | {"heads": "L2H1"})["rows"]
    assert other == measured(Asker(llama.hooked, probe[:4], PROMPT), asked | {"heads": "L2H1"})["rows"]
    assert other != found["rows"]


def test_the_next_token_is_that_of_the_lines_beside_it(asker, llama, probe, capsys):
    for text in ("Rain", ""):
        found = measured(asker, request(probe[0].examples[-1], text=text))
        names = ran(found["python"], llama.hooked, list(probe[:4]))
        assert ("effects" in names) == bool(text)
        shown = {token for name in ("plain", "ablated") for token in names[name].topk(8).indices.tolist()}
        expected = sorted(
            (llama.hooked.tokenizer.decode([one]), float(names["plain"][one]), float(names["ablated"][one]))
            for one in shown
        )
        for one, other in zip(sorted(found["next"]), expected, strict=True):
            assert one[0] == other[0]
            assert one[1:] == pytest.approx(other[1:], abs=1e-6)
    capsys.readouterr()


def test_the_same_tokens_split_elsewhere_are_another_question(llama, probe):
    """Without a chat template, the end of a question may read as the beginning of a text."""
    model, users = llama.hooked, list(probe[:4])

    def run_of(start, kept):
        work = KeptRuns.of_one_set(
            model, [replace(users[0], examples=users[0].examples[-1:])], HeadSet.parse("L0H1"), n_random=0,
            prompt_config=PROMPT, runs=kept,
        )  # fmt: skip
        prompt = dps.build_prompt(model, users[0].examples[-1], config=PROMPT)
        begin, end = prompt.spans["response"]
        moved = replace(prompt, spans={**prompt.spans, "response": (begin + start, end)})
        return work.clean_run(moved, "own").nll

    kept = OrderedDict()
    assert run_of(0, kept) != run_of(1, kept)
    assert len(kept) == 2


def test_an_error_of_any_kind_is_told(explored, llama, probe, monkeypatch):
    client = make_app(llama.hooked, probe[:4], explored).test_client()
    asked, base = request(probe[0].examples[-1]), {"base_url": f"http://{HOST}:8050"}

    def breaks(self, asked):
        yield {"next": []}
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Asker, "measure", breaks)
    lines = [json.loads(line) for line in client.post("/ask", json=asked, **base).data.decode().splitlines()]
    assert lines[-1] == {"error": "RuntimeError: out of memory"}
    assert "error" in client.get("/nowhere", **base).get_json()
    assert "error" in client.post("/ask", json=asked | {"prompt": "x" * 2**23}, **base).get_json()


@pytest.mark.parametrize("gamma", [-1, 1.5])
@pytest.mark.parametrize("rule", STEERED_BY)
def test_every_rule_comes_over_the_wire(explored, llama, probe, rule, gamma):
    """Where the full model does not run, nothing is known to have moved, and JSON knows no NaN."""
    client = make_app(llama.hooked, probe[:4], explored).test_client()
    asked, base = request(probe[0].examples[-1], rule=rule, gamma=gamma), {"base_url": f"http://{HOST}:8050"}

    def refuse(constant):
        raise AssertionError(constant)

    lines = client.post("/write", json=asked, **base).data.decode().splitlines()
    last = [json.loads(line, parse_constant=refuse) for line in lines][-1]
    assert len(last["done"]["pieces"]) <= 5
    assert len(last["done"]["alternatives"]) == len(last["done"]["pieces"])


@pytest.mark.parametrize("text", ["Rain", ""], ids=["beside a text", "without one"])
def test_next_tokens_are_those_of_the_model(asker, llama, probe, text):
    """Beside hooks of transformer-lens that zero z at the last prompt token."""
    asked = request(probe[0].examples[-1], text=text)
    found = measured(asker, asked)
    question = asker.read(asked)
    tokens = dps.build_prompt(llama.hooked, question.example, config=PROMPT, response=False).tokens[None]

    def zero(head):
        def hook(z, hook):
            z[:, -1, head] = 0
            return z

        return hook

    hooks = [(f"blocks.{head.layer}.attn.hook_z", zero(head.head)) for head in question.heads]
    with torch.no_grad():
        plain = llama.hooked(tokens)[0, -1].softmax(-1)
        edited = llama.hooked.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1].softmax(-1)
    shown = {token for shares in (plain, edited) for token in shares.topk(8).indices.tolist()}
    expected = sorted(
        (llama.hooked.tokenizer.decode([token]), float(plain[token]), float(edited[token])) for token in shown
    )
    assert [one[0] for one in sorted(found["next"])] == [one[0] for one in expected]
    for one, other in zip(sorted(found["next"]), expected, strict=True):
        assert one[1:] == pytest.approx(other[1:], abs=1e-6)
    assert [one[1] for one in found["next"]] == sorted((one[1] for one in found["next"]), reverse=True)
    assert bool(found["rows"]) == bool(text)


@pytest.mark.parametrize("rule", ["dps", "dps-entropy", "decore", "amplify"])
def test_a_text_is_that_of_the_call_beside_it(asker, llama, probe, rule, capsys):
    *pieces, last = asker.write(asker.read(request(probe[0].examples[-1], rule=rule)))
    written = ran(last["python"], llama.hooked, list(probe[:4]))["written"]
    capsys.readouterr()
    assert "".join(piece["text"] for piece in pieces) == written.texts[0]
    assert last["done"]["pieces"] == written.pieces[0]


@pytest.mark.parametrize("rule", ADDED_BY)
def test_a_users_vector_is_added_at_the_heads_asked_about(llama, probe, rule, capsys):
    users = list(probe[:4])
    vectors = dps.head_vectors(llama.hooked, users, HeadSet.parse("L1H2,L0H0,L2H1"), max_examples=1)
    asker = Asker(llama.hooked, users, PROMPT, vectors=vectors)
    asked = request(users[0].examples[-1], rule=rule, gamma=2.0)
    *pieces, last = asker.write(asker.read(asked))
    names = {"model": llama.hooked, "users": users, "vectors": vectors}
    exec(last["python"], names)
    capsys.readouterr()
    assert "".join(piece["text"] for piece in pieces) == names["written"].texts[0]
    assert names["written"].manifest["rule"] == rule
    for changed, field in (
        ({"heads": "L2H3"}, "heads"),
        ({"user": "", "documents": "One.\n\nTwo."}, "rule"),
    ):
        with pytest.raises(Refused) as refused:
            list(asker.write(asker.read(asked | changed)))
        assert refused.value.field == field
    with pytest.raises(Refused, match="use one of"):
        Asker(llama.hooked, users, PROMPT).read(asked)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("user", "nobody", "not on this page"),
        ("heads", "L9H9", "L9H9"),
        ("heads", "", "none are named"),
        ("heads", "first", "is not a head"),
        ("ablation", "mean", "use one of zero, uniform"),
        ("rule", "cad", "use one of dps"),
        ("gamma", -2, "from -1 to"),
        ("gamma", None, "not a number"),
        ("gamma", float("nan"), "not a number"),
        ("length", 0, "from 1 to 512"),
        ("length", 1.5, "1.5"),
        ("prompt", " ", "is empty"),
        ("prompt", 7, "is not a text"),
        ("prompt", "x" * 200_000, "at most 100000"),
    ],
)
def test_a_question_that_cannot_be_answered_names_its_field(asker, probe, field, value, said):
    with pytest.raises(Refused) as refused:
        asker.read(request(probe[0].examples[-1]) | {field: value})
    assert refused.value.field == field
    assert said in str(refused.value)


@pytest.mark.parametrize("documents", [" \n\n ", "Rain."])
def test_documents_must_be_there(asker, probe, documents):
    with pytest.raises(Refused, match="paste earlier texts") as refused:
        asker.read(request(probe[0].examples[-1], user="", documents=documents, text="Rain."))
    assert refused.value.field == "documents"


def test_a_blank_line_may_hold_blanks(asker, probe):
    asked = request(probe[0].examples[-1], user="", documents="One.\n \t\nTwo.\r\n\r\nThree,\nfour.")
    assert len(asker.read(asked).users[0].history) == 3


def test_those_who_wait_are_told_and_served_in_turn():
    line, served_now = Line(most=3), []
    first, second, third = line.join(), line.join(), line.join()
    with pytest.raises(BusyError, match="3 questions are waiting"):
        line.join()

    def answer(name):
        served_now.append(name)
        yield {"text": name}

    waiting = line.served(third, lambda: answer("third"))
    assert next(waiting) == {"waiting": 2}
    line.leave(second)  # its reader went away
    assert next(waiting) == {"waiting": 1}
    assert [*line.served(first, lambda: answer("first"))] == [{"waiting": 0}, {"text": "first"}]
    assert [*waiting] == [{"waiting": 0}, {"text": "third"}]
    assert served_now == ["first", "third"]
    assert line.join() is not None


@pytest.mark.parametrize("ablation", ["zero", "uniform"])
def test_what_was_prepared_is_not_read_again(asker, llama, probe, ablation, monkeypatch):
    asked = request(probe[1].examples[-1], ablation=ablation)
    fresh = measured(Asker(llama.hooked, probe[:4], PROMPT), asked)
    # Four prompts; where a patch starts from another attention's run, two more.
    assert len([*asker.prepare(asker.read(asked), lambda: False)]) == 6
    kept = len(asker._runs)
    prefills, runner = [], type(runner_of(llama.hooked))
    prefill = runner.prefill
    monkeypatch.setattr(runner, "prefill", lambda *args, **options: prefills.append(1) or prefill(*args, **options))
    assert measured(asker, asked) == fresh
    assert not prefills
    assert len(asker._runs) == kept
    # Whoever waits goes first.
    other = Asker(llama.hooked, probe[:4], PROMPT)
    assert not [*other.prepare(other.read(asked), lambda: True)]
    steps = other.prepare(other.read(asked), iter([False, False, True]).__next__)
    assert len([*steps]) == 2
    assert 0 < len(other._runs) < kept


def test_the_page_reads_what_will_be_asked(url, probe, open_page):
    opened = open_page(url + "#tab=ask", offline=False)
    page = opened.page
    sent = []
    page.on("request", lambda one: sent.append(one.url.removeprefix(url)))
    page.wait_for_timeout(1000)
    sent.clear()
    with page.expect_response(url + "prepare") as prepared:
        page.select_option("#ask-example", index=2)
    assert prepared.value.ok
    page.fill("#ask-heads", "L1H2")
    page.fill("#ask-gamma", "2")
    page.wait_for_timeout(600)
    assert sent == ["prepare"]
    page.fill("#ask-text", "")
    page.wait_for_timeout(600)
    assert sent == ["prepare"]
    assert not opened.problems


def test_a_head_is_described_in_the_shown_example(url, llama, probe, explored, open_page, capsys):
    opened = open_page(url, offline=False)
    page, users = opened.page, list(probe[:4])
    page.fill("#head", "L1H2")
    page.press("#head", "Enter")
    page.select_option("#view", index=1)
    with page.expect_response(url + "describe") as reply:
        page.click("#describe")
    page.wait_for_selector("#dossier .main-svg")
    asked = explored.views[1].user
    assert asked in page.locator("#dossier-said").inner_text()
    (line,) = [json.loads(one) for one in reply.value.body().decode().splitlines() if "figure" in one]
    names = ran(line["python"], llama.hooked, users)
    assert "reads" in capsys.readouterr().out
    assert line["figure"] == json.loads(names["found"].plot().to_json())
    expected = dps.describe_head(llama.hooked, names["asked"], "L1H2", prompt_config=PROMPT)
    assert expected.to_frame().equals(names["found"].to_frame())
    assert {*expected.user_ids} == {asked}
    # It stays with its head and its example.
    page.select_option("#view", index=0)
    assert page.locator("#dossier").is_hidden()
    assert page.locator("#describe").is_visible()
    page.select_option("#view", index=1)
    page.wait_for_selector("#dossier .main-svg")
    assert page.locator("#describe").is_hidden()
    assert page.locator("#dossier-take").get_by_role("button", name="Copy Python").is_visible()
    assert not opened.problems


def test_a_head_that_cannot_be_described_is_named(explored, llama, probe):
    client, base = make_app(llama.hooked, probe[:4], explored).test_client(), {"base_url": f"http://{HOST}:8050"}
    for field, value in (("head", "L9H9"), ("head", 7), ("user", "nobody"), ("user", None)):
        asked = {"head": "L1H2", "user": probe[0].id} | {field: value}
        refused = client.post("/describe", json=asked, **base)
        assert (refused.status_code, refused.get_json()["field"]) == (400, field)
    assert client.post("/describe", json=[], **base).status_code == 400


def test_the_wire_is_closed_to_others(explored, llama, probe):
    client = make_app(llama.hooked, probe[:4], explored).test_client()
    asked, base = request(probe[0].examples[-1]), {"base_url": f"http://{HOST}:8050"}
    page = client.get("/", **base)
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert "frame-ancestors 'self'" in page.headers["Content-Security-Policy"]
    for origin, status in (("http://evil.example", 403), (f"http://{HOST}:8051", 403), (f"http://{HOST}:8050", 200)):
        assert client.post("/ask", json=asked, headers={"Origin": origin}, **base).status_code == status
    refused = client.post("/ask", json=asked | {"heads": "L9H9"}, **base)
    assert (refused.status_code, refused.get_json()["field"]) == (400, "heads")
    for path in ("/ask", "/write", "/prepare", "/describe"):
        assert client.post(path, data=json.dumps(asked), content_type="text/plain", **base).status_code == 400
    lines = client.post("/ask", json=asked, **base).data.decode().splitlines()
    assert [{*json.loads(line)} for line in lines] == [{"waiting"}, {"next"}, {"rows", "python", "command"}]


def test_the_page_asks_pins_and_undoes(url, asker, probe, open_page):
    opened = open_page(url + "#tab=ask", offline=False)
    page = opened.page
    page.fill("#ask-heads", "L1H2")
    page.click("#ask-measure")
    expect(page.locator("#answer-1 table")).to_have_count(2)
    example = probe[0].examples[-1]
    row = measured(asker, request(example, heads="L1H2"))["rows"][0]
    cells = page.locator("#answer-1 table").first.locator("tr").nth(1).locator("td").all_inner_texts()
    assert cells[0] == "NLL, own"
    assert [float(cell.replace("−", "-")) for cell in cells[1:3]] == pytest.approx(
        [row["full"], row["edited"]], abs=6e-4
    )
    # Own words on another user's profile, and a set of a family.
    page.select_option("#ask-user", probe[1].id)
    page.fill("#ask-prompt", f"A title about rain {EVIL}")
    page.fill("#ask-text", "Rain")
    assert page.input_value("#ask-example") == ""
    page.select_option("#ask-set", "outlined heads")
    page.click("#ask-measure")
    expect(page.locator("#answer-2 table")).to_have_count(2)
    for number in (1, 2):
        page.locator(f"#answer-{number}").get_by_role("button", name="Pin").click()
    expect(page.locator("#ask-pinned")).to_contain_text("1. zero ablation, 1 heads beside 2. zero ablation, 2 heads")
    assert page.locator("#ask-pinned tr").count() > 5
    page.fill("#ask-length", "4")
    page.click("#ask-write")
    expect(page.locator("#answer-3 .tokens span")).to_have_count(4)
    asked = request(example, user=probe[1].id, prompt=f"A title about rain {EVIL}", text="Rain", length=4, gamma=1,
                    heads=page.input_value("#ask-heads"))  # fmt: skip
    written = [*asker.write(asker.read(asked))][-1]["done"]["pieces"]
    assert page.locator("#answer-3 .tokens span").all_text_contents() == written
    assert "dps.generate(" in page.locator("#answer-3 pre").inner_text() or page.locator("#answer-3 pre").count()
    page.click("#ask-undo")
    expect(page.locator("#answer-3")).to_have_count(0)
    # The address holds the question, and opens it again.
    again = open_page(page.url, offline=False).page
    assert again.input_value("#ask-text") == "Rain"
    assert page.evaluate("window.hacked") is None
    assert not opened.problems


def test_heads_are_picked_on_the_map_and_sets_are_kept(url, open_page):
    page = open_page(url + "#head=L2H3", offline=False).page
    before = page.input_value("#ask-heads").split(",")
    assert "L2H3" not in before
    page.click("#pick")
    assert page.input_value("#ask-heads").split(",") == [*before, "L2H3"]
    expect(page.locator("#pick")).to_contain_text("Take out")
    box = page.evaluate(
        """([x, y]) => {
            const plot = document.getElementById("heatmap"), box = plot.getBoundingClientRect();
            const { xaxis, yaxis } = plot._fullLayout;
            return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
        }""",
        [3, 2],
    )
    page.mouse.move(*box)
    page.wait_for_selector(".hoverlayer .hovertext")
    page.keyboard.down("Shift")
    page.mouse.click(*box)
    page.keyboard.up("Shift")
    expect(page.locator("#pick")).to_contain_text("Put into")
    page.click("#tab-ask")
    page.fill("#ask-heads", "L0H1,L0H2")
    page.fill("#ask-name", "mine")
    page.click("#ask-keep")
    page.select_option("#ask-set", "outlined heads")
    page.select_option("#ask-set", "mine")
    assert page.input_value("#ask-heads") == "L0H1,L0H2"
    page.go_back()
    assert page.locator("#ask-set option", has_text="mine").count() == 0


def test_what_is_refused_stands_beside_its_field(url, open_page):
    page = open_page(url + "#tab=ask", offline=False).page
    for field, value, said in (
        ("heads", "L99H0", "L99H0"),
        ("gamma", "many", "not a number"),
        ("length", "0", "from 1 to 512"),
    ):
        before = page.input_value(f"#ask-{field}")
        page.fill(f"#ask-{field}", value)
        page.click("#ask-write")
        expect(page.locator(f"#ask-refused-{field}")).to_contain_text(said)
        assert page.locator(f"#ask-{field}").get_attribute("aria-invalid") == "true"
        page.fill(f"#ask-{field}", before)
    page.click("#ask-write")
    expect(page.locator("#answer-4 .tokens span").first).to_be_visible()
    assert page.locator("#ask [aria-invalid]").count() == 0


def test_two_pages_ask_at_once_and_a_cancel_frees_the_model(explored, llama, probe, open_page, monkeypatch):
    go_on = threading.Event()

    def slowly(self, asked):
        yield {"text": f"{asked.gamma:g}"}
        go_on.wait(20)
        yield {"text": " more"}

    monkeypatch.setattr(Asker, "write", slowly)
    with dps.serve(llama.hooked, probe[:4], explored) as live:
        url = live.url
        one, two = (open_page(url + "#tab=ask", offline=False).page for _ in range(2))
        one.fill("#ask-gamma", "1")
        one.click("#ask-write")
        expect(one.locator("#answer-1 .tokens")).to_have_text("1")
        two.fill("#ask-gamma", "2")
        two.click("#ask-write")
        expect(two.locator("#answer-1")).to_contain_text("waiting, 1 before this one")
        one.click("#ask-cancel")
        expect(one.locator("#answer-1")).to_contain_text("cancelled")
        go_on.set()
        expect(two.locator("#answer-1 .tokens")).to_have_text("2 more")
        assert two.locator("#ask-spinner").is_hidden()


def test_a_notebook_shows_the_page(explored, llama, probe, open_page):
    """As a file inside a cell, and live from a thread of the kernel."""
    opened = open_page("about:blank")
    opened.page.set_content(explored._repr_html_())
    frame = opened.page.frame_locator("iframe")
    frame.locator("#head").fill("L1H1")
    frame.locator("#head").press("Enter")
    expect(frame.locator("#detail-name")).to_have_text("L1H1")
    assert not opened.problems
    with dps.serve(llama.hooked, probe[:4], explored) as live:
        assert repr(live) == f"LivePage({live.url})"
        notebook = Flask("notebook")
        notebook.add_url_rule("/", view_func=live._repr_html_)
        with LivePage(notebook) as another:
            frame = open_page(another.url, offline=False).page.frame_locator("iframe")
            frame.locator("#tab-ask").click()
            frame.locator("#ask-measure").click()
            expect(frame.locator("#answer-1 table").first).to_be_visible()
        with pytest.raises(SteeringError, match="cannot be had"):
            dps.serve(llama.hooked, probe[:4], explored, port=int(live.url.rsplit(":", 1)[1].strip("/")))
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(live.url, timeout=2)


@pytest.mark.parametrize("ask", ['{"heads":5,"evil":"x"}', '{"gamma":1}', "[1]", "7", "{", '"text"'])
def test_a_corrupt_address_opens_the_page(url, open_page, ask):
    opened = open_page(f"{url}#tab=ask&head=l2h3&ask={ask}&sets={ask}", offline=False)
    page = opened.page
    assert page.input_value("#ask-gamma") == "1"
    assert page.input_value("#ask-heads")
    page.click("#ask-measure")
    expect(page.locator("#answer-1 table").first).to_be_visible()
    page.click("#tab-heads")
    for said in ("Take out", "Put into"):
        page.click("#pick")
        expect(page.locator("#pick")).to_contain_text(said)
    assert not opened.problems


def test_an_error_of_a_removed_answer_removes_no_other(explored, llama, probe, open_page, monkeypatch):
    go_on = threading.Event()

    def slowly(self, asked):
        yield {"text": "begun"}
        go_on.wait(20)
        raise Refused("prompt", "too late")

    with dps.serve(llama.hooked, probe[:4], explored) as live:
        page = open_page(live.url + "#tab=ask", offline=False).page
        page.click("#ask-measure")
        expect(page.locator("#answer-1 table")).to_have_count(2)
        page.locator("#answer-1 summary").click()
        monkeypatch.setattr(Asker, "write", slowly)
        page.click("#ask-write")
        expect(page.locator("#answer-2 .tokens")).to_have_text("begun")
        page.click("#ask-undo")
        go_on.set()
        page.wait_for_timeout(500)
        assert page.locator("#answer-1").is_visible()
        assert page.locator("#answer-2").count() == 0
        # What is open stays open while the form is filled.
        page.fill("#ask-text", "Rain")
        assert page.locator("#answer-1 pre").is_visible()
        page.locator("#answer-1").get_by_role("button", name="Pin").press("Enter")
        assert page.evaluate("document.activeElement.textContent") == "Unpin"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_answers_fit_a_narrow_screen_and_axe_finds_nothing_serious(url, open_page, scheme):
    import axe_playwright_python

    axe = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    page = open_page(url + "#tab=ask", offline=False, bypass_csp=True, color_scheme=scheme).page
    page.click("#ask-measure")
    expect(page.locator("#answer-1 table")).to_have_count(2)
    page.locator("#answer-1 summary").click()
    page.fill("#ask-gamma", "many")
    page.click("#ask-write")
    expect(page.locator("#ask-refused-gamma")).to_contain_text("'many' is not a number")
    page.evaluate(axe)
    found = [one for one in page.evaluate("axe.run()")["violations"] if one["impact"] in ("serious", "critical")]
    assert [(one["id"], one["nodes"][0]["target"]) for one in found] == []
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_page_that_is_no_longer_served_asks_nobody(explored, tmp_path, open_page):
    page = open_page(explored.write(tmp_path / "page.html").as_uri()).page
    assert page.locator("#tab-ask").count() == 0
    assert page.locator("#pick").count() == 0


def test_a_set_of_the_whole_page_may_be_asked_about(asker, llama, probe):
    """A user's profile with heads of every layer; the users are the page's own."""
    heads = HeadSet([(layer, head) for layer in range(3) for head in range(4)])
    question = asker.read(request(probe[2].examples[-1], heads=str(heads)))
    assert question.heads.heads == heads.heads
    assert [user.id for user in question.users] == [user.id for user in probe[:4]]
    assert [len(user.examples) for user in question.users] == [0, 0, 1, 0]
    assert replace(question.users[2], examples=()).history == probe[2].history
