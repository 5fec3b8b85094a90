"""The page in a real browser: it holds the run's numbers, runs no text of users, and needs no network."""

import html
import io
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import no_hooks_left
from pcs import score_pcs
from playwright.sync_api import expect

import dps_lens as dps
from dps_lens.errors import ScoreError, SteeringError
from dps_lens.explorer import ExampleView, Exploration
from dps_lens.explorer.page import content, page
from dps_lens.explorer.render import showcase
from dps_lens.explorer.server import HOST, make_app
from dps_lens.explorer.views import Answer
from dps_lens.explorer.writer import Writer
from dps_lens.heads import Head, HeadSet

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
EVIL_ANSWERS = (Answer((EVIL,), (0.5,)), Answer((EVIL,), (-0.5,)))
PROMPT = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=20, response_tokens=6)


@pytest.fixture(scope="module")
def explored(tinies, probe, tmp_path_factory):
    model, out = tinies("llama").hooked, tmp_path_factory.mktemp("explored")
    scores = score_pcs(model, probe[:6], max_examples=2, prompt_config=PROMPT)
    families = {
        "induction": dps.HeadScores(
            torch.rand(2, 3, 4), example_ids=["p", "q"], user_ids=["p", "q"],
            manifest={"family": "induction", "unit": "attention"},
        ),
        "retrieval": dps.HeadScores(
            torch.full((1, 3, 4), torch.nan), example_ids=["p"], user_ids=["p"], manifest={"reason": "no needle found"}
        ),
    }  # fmt: skip
    options = {"prompt_config": PROMPT, "max_examples": 1}
    effects = dps.ablation_curve(model, probe[:6], {"preference": scores}, ks=(1, 2), n_random=2, **options)
    cost = dps.ablation_cost(model, probe[:6], scores, k=3, n_random=2, max_examples=1)
    shown = {"gammas": (0.5, 2.0), "ks": (1, 3), "max_users": 3, "max_new_tokens": 8}
    patched = dps.score_heads(model, probe[:6], max_examples=1, prompt_config=PROMPT)
    shown |= {"families": families, "effects": effects, "cost": cost}
    return dps.explore(model, probe[:6], {"scores": scores, "integrated patch": patched}, out=out, **shown)


@pytest.fixture(scope="module")
def report(explored, tmp_path_factory):
    return explored.write(tmp_path_factory.mktemp("report") / "report.html")


def shown(value, digits=4):
    return f"{value:.{digits}f}".replace("-", "−")


def detail(page):
    facts = page.locator("#detail-facts").inner_text().split("\n")
    return page.locator("#detail-name").inner_text(), facts


def click_head(page, head):
    """A click where plotly drew the head's cell."""
    box = page.evaluate(
        """([x, y]) => {
            const plot = document.getElementById("heatmap"), box = plot.getBoundingClientRect();
            const { xaxis, yaxis } = plot._fullLayout;
            return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
        }""",
        [head.head, head.layer],
    )
    page.mouse.move(*box)
    page.wait_for_selector(".hoverlayer .hovertext")
    page.mouse.click(*box)


def test_a_click_on_a_cell_shows_the_head(explored, report, open_page):
    opened = open_page(report.as_uri())
    page, scores = opened.page, explored.scores
    assert detail(page)[0] == str(explored.heads[0])
    head = Head(2, 1)
    click_head(page, head)
    expect(page.locator("#detail-name")).to_have_text("L2H1")
    name, facts = detail(page)
    low, high = (bound[head] for bound in scores.ci())
    assert f"{shown(float(scores.mean()[head]))} nats per token" in facts
    assert f"{shown(float(low))} to {shown(float(high))}" in facts
    rank = scores.to_frame().set_index("name").index.get_loc(name) + 1
    assert f"{rank} of 12" in facts
    ranks = page.locator("#detail-ranks").inner_text()
    assert shown(float(explored.families["induction"].mean()[head])) in ranks
    assert "not shown by this model" in ranks
    assert page.locator("#detail-examples circle").count() == len(scores.values)
    assert not opened.problems
    assert opened.requests == [report.as_uri()], "nothing else is asked for"


def test_one_user_gets_their_own_examples(explored, report, open_page):
    page, scores = open_page(report.as_uri()).page, explored.scores
    user, head = scores.users[2], Head(1, 1)
    page.select_option("#user", user)
    page.fill("#head", "l1h1")
    page.press("#head", "Enter")
    name, facts = detail(page)
    low, high = (bound[head] for bound in scores.ci(0.95, user))
    assert name == "L1H1"
    assert f"{shown(float(scores.mean(user)[head]))} nats per token" in facts
    assert f"{shown(float(low))} to {shown(float(high))}" in facts
    assert page.locator("#detail-examples circle").count() == 2
    assert "no claim about heads" in page.locator("#map-note").inner_text()
    page.select_option("#map", "PCS, own profile")
    assert f"{shown(float(scores.mean(user, of='own')[head]))} nats per token" in detail(page)[1]
    page.select_option("#map", "integrated patch")
    assert f"{shown(float(explored.maps['integrated patch'].mean(user)[head]))} nats per token" in detail(page)[1]
    page.select_option("#map", "induction")
    assert f"{shown(float(explored.families['induction'].mean()[head]))} attention" in detail(page)[1]
    # Attention and texts are of the same user, where the page has them.
    chosen = explored.views[1].user
    page.select_option("#user", chosen)
    for where in ("#view", "#text"):
        assert page.locator(f"{where} option:checked").inner_text().startswith(f"{chosen}: ")


def test_the_keyboard_and_the_address_work(explored, report, open_page):
    opened = open_page(f"{report.as_uri()}#head=L0H0&user={explored.scores.users[1]}")
    page = opened.page
    assert page.input_value("#user") == explored.scores.users[1]
    page.focus("#heatmap")
    for key in ("ArrowRight", "ArrowUp", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert detail(page)[0] == "L1H1"
    assert "head=L1H1" in page.url
    page.focus("#tab-heads")
    page.keyboard.press("ArrowRight")
    assert page.locator("#overlap").is_visible()
    assert not page.locator("#heads").is_visible()
    again = open_page(page.url).page
    assert again.locator("#overlap").is_visible()
    again.keyboard.press("Tab")
    for broken in ("#head=L9H9&user=nobody&tab=nothing&gamma=7", "#%", "#tab=detail"):
        found = open_page(report.as_uri() + broken)
        assert detail(found.page)[0] == str(explored.heads[0])
        assert not found.problems


def test_attention_is_shown_token_by_token(explored, report, open_page, llama, probe):
    page, view = open_page(report.as_uri()).page, explored.views[0]
    user = next(user for user in probe if user.id == view.user)
    prompt = dps.build_prompt(llama.hooked, user.examples[-1], config=PROMPT)
    _, cache = llama.hooked.run_with_cache(prompt.tokens[None])
    start, stop = prompt.spans["response"]
    expected = cache["blocks.1.attn.hook_pattern"][0, 2, start - 1 : stop - 1].mean(0)
    page.fill("#head", "L1H2")
    page.press("#head", "Enter")
    tokens = page.locator("#attention span")
    assert tokens.all_text_contents() == list(view.pieces)
    at = int(expected.argmax())
    said = tokens.nth(at).get_attribute("aria-description")
    assert float(said.split("%")[0]) == pytest.approx(100 * float(expected[at]), abs=0.1)
    inside = float(expected[slice(*prompt.spans["profile"])].sum())
    note = page.locator("#view-note").inner_text()
    assert int(re.search(r"(\d+)% on the profile", note)[1]) == pytest.approx(100 * inside, abs=1.5)


def test_a_token_of_the_response_shows_what_it_looks_at(explored, report, open_page, llama, probe):
    page, view = open_page(report.as_uri()).page, explored.views[0]
    user = next(user for user in probe if user.id == view.user)
    prompt = dps.build_prompt(llama.hooked, user.examples[-1], config=PROMPT)
    head = explored.heads[1]
    pattern = dps.attention_pattern(llama.hooked, prompt, HeadSet([head])).pattern[0]
    start = prompt.spans["response"][0]
    page.fill("#head", str(head))
    page.press("#head", "Enter")
    tokens = page.locator("#attention span")
    tokens.nth(start + 2).click()
    assert "token=2" in page.url
    assert "is read" in page.locator("#view-note").inner_text()
    largest = float(pattern.max())
    for at in (0, prompt.spans["profile"][0] + 3, start):
        said = float(tokens.nth(at).get_attribute("aria-description").split("%")[0])
        assert said == pytest.approx(100 * float(pattern[2, at]), abs=100 * largest / 255 + 0.05)
    page.click("text=By document")
    rows = page.locator("#documents tr")
    assert rows.count() == 1 + len(prompt.items) + 2
    for place, (begin, end) in enumerate(prompt.items):
        share = float(rows.nth(1 + place).locator("td").last.inner_text().strip("%"))
        assert share == pytest.approx(100 * float(pattern[2, begin:end].sum()), abs=100 * largest / 255 * (end - begin))
    tokens.nth(start + 2).click()
    assert "token" not in page.url
    # Heads that are not tested are kept as means only.
    other = next(one for one in view.heads if one not in explored.heads)
    page.fill("#head", str(other))
    page.press("#head", "Enter")
    assert page.locator("#attention .choice").count() == 0
    for broken in ("99", "-1", "x"):
        found = open_page(f"{report.as_uri()}#token={broken}")
        assert found.page.locator("#attention .chosen").count() == 0
        assert not found.problems


def test_a_pair_shows_both_answers_with_what_the_profile_does(llama, probe, tmp_path, open_page):
    users = dps.make_pairs(probe[:2])
    options = {"prompt_config": PROMPT, "max_examples": 1}
    scores = dps.score_heads(llama.hooked, users, objective="pair", **options)
    found = dps.explore(llama.hooked, users, scores, k=2, gammas=(1.0,), ks=(2,), max_users=1, max_new_tokens=4)
    page = open_page(found.write(tmp_path / "pair.html").as_uri()).page
    example = users[0].examples[-1]
    own, none = (dps.build_prompt(llama.hooked, example, of, config=PROMPT) for of in ("own", "none"))
    shown_answers = page.locator("#answers p.tokens")
    assert shown_answers.count() == 2
    for place, prompts in enumerate(zip(own.answers, none.answers, strict=True)):
        logps = []
        for prompt in prompts:
            start, stop = prompt.spans["response"]
            with torch.no_grad():
                logits = llama.plain(input_ids=prompt.tokens[None]).logits[0, start - 1 : stop - 1].double()
            logps.append(logits.log_softmax(-1).gather(-1, prompt.response_tokens[:, None])[:, 0])
        spans = shown_answers.nth(place).locator("span")
        whole = (example.reference, *example.rejected)[place]
        assert whole.startswith("".join(spans.all_text_contents()).strip())
        for index, gain in enumerate((logps[0] - logps[1]).tolist()):
            said = spans.nth(index).get_attribute("aria-description").rsplit(" ", 1)[1].replace("−", "-")
            assert float(said) == pytest.approx(gain, abs=2e-3)
    assert page.locator("#answers p.hint").nth(1).inner_text().startswith("rejected: ")


def test_the_page_of_the_package_works(tmp_path, open_page):
    file = tmp_path / "shown.html"
    file.write_text(showcase(), encoding="utf-8")
    opened = open_page(file.as_uri())
    assert re.search(r"Made by dps_lens .* with: dps-lens demo", opened.page.locator(".note").inner_text())
    for tab in ("overlap", "ablation", "texts", "about", "heads"):
        opened.page.click(f"#tab-{tab}")
        text = opened.page.locator(f"#{tab}").inner_text()
        assert text.strip()
        assert "undefined" not in text
        assert "NaN" not in text
    assert "heads that find_heads found; each user is tested" in opened.page.locator("#map-note").inner_text()
    assert not opened.problems
    assert opened.requests == [file.as_uri()]


def test_a_page_of_maps_needs_no_held_out_text(explored, llama, probe, tmp_path, open_page):
    users = [replace(user, examples=()) for user in probe[:6]]
    found = dps.explore(llama.hooked, users, explored.scores, k=2, max_users=0)
    assert (found.grid, found.views) == (None, ())
    opened = open_page(replace(found, note="2 of 6 users").write(tmp_path / "maps.html").as_uri())
    assert opened.page.locator(".note").inner_text() == "2 of 6 users"
    assert detail(opened.page)[0] == str(found.heads[0])
    opened.page.click("#tab-texts")
    assert not opened.problems
    with pytest.raises(ScoreError, match="max_users"):
        dps.explore(llama.hooked, users, explored.scores, max_users=-1)


def test_sliders_show_the_grid(explored, report, open_page):
    opened = open_page(report.as_uri() + "#tab=texts")
    page, grid = opened.page, explored.grid
    example = explored.views[0].example
    for gamma_at, gamma in ((2, 2.0), (1, 0.5)):
        for k_at, k in ((0, 1), (1, 3)):
            page.locator("#gamma").fill(str(gamma_at))
            page.locator("#k").fill(str(k_at))
            one = grid.find(example, gamma, k)
            assert page.locator("#text-steered span").all_text_contents() == one.pieces
            assert one.heads in page.locator("#text-note").inner_text()
    one = grid.find(example, 0.5, 3)
    token = page.locator("#text-steered span").first
    token.hover()
    tip = page.locator("#tip").inner_text()
    assert f"log p steered − full {shown(one.shifts[0], 3)}" in tip
    assert json.dumps(one.alternatives[0][0][0], ensure_ascii=False) in tip
    assert page.locator("#text-plain span").all_text_contents() == grid.find(example, 0.0, 0).pieces
    assert page.locator("#text-own").inner_text() == grid.references[one.key]
    assert f"gamma={gamma:g}" in page.url or "gamma" not in page.url
    assert not opened.problems


def test_overlap_and_ablation_are_figures_of_the_run(explored, report, open_page):
    opened = open_page(report.as_uri() + "#tab=overlap")
    page = opened.page
    page.wait_for_selector("#overlap .js-plotly-plot")
    names = page.evaluate("document.querySelector('#overlap .js-plotly-plot').data[0].x")
    assert {*names} == {*explored.scores.users}
    page.select_option("#overlap select", "families")
    page.click("#tab-ablation")
    table = page.locator("#ablation table").inner_text()
    for row in explored.cost.beside_random().to_dict("records"):
        assert shown(row["mean"], 3) in table
    page.select_option("#ablation select", "task_cost")
    expect(page.locator("#ablation .ytitle")).to_contain_text("cost")
    assert "ablation=task_cost" in page.url
    page.click("#tab-about")
    assert "zero, positions response" in page.locator("#about").inner_text()
    assert not opened.problems


def test_what_heads_do_has_a_tab_where_it_was_asked(explored, report, llama, probe, tmp_path, open_page, unchecked):
    options = {"prompt_config": PROMPT, "max_examples": 1, "n_random": 1}
    head, model = dps.Head(1, 2), llama.hooked
    dossier = dps.describe_head(model, probe[:6], head, **options)
    paths = dps.patch_paths(model, probe[:6], HeadSet.parse("L0H1"), HeadSet([head]), into="q", **options)
    twice = content(explored.showing(dossier, paths, dossier))["figures"]["mechanism"]
    assert [*twice] == [str(head), "paths", f"{head} (2)"]
    opened = open_page(explored.showing(dossier, paths).write(tmp_path / "page.html").as_uri() + "#tab=mechanism")
    page = opened.page
    page.wait_for_selector("#mechanism .js-plotly-plot")
    assert page.locator("#mechanism select option").all_inner_texts() == [str(head), "paths"]
    expect(page.locator("#mechanism .gtitle")).to_contain_text(str(head))
    page.select_option("#mechanism select", "paths")
    expect(page.locator("#mechanism .js-plotly-plot")).to_contain_text("logits")
    assert "mechanism=paths" in page.url
    # The dossier is the head's detail, too; where there is none, the page says how to get one.
    page.click("#tab-heads")
    for name, drawn in ((str(head), True), ("L0H0", False), (str(head), True)):
        page.fill("#head", name)
        page.press("#head", "Enter")
        expect(page.locator("#dossier .gtitle")).to_be_visible(visible=drawn)
        assert ("dps-lens describe L0H0" in page.locator("#dossier-said").inner_text()) == (not drawn)
    assert page.locator("#describe").is_hidden()
    assert not opened.problems
    assert not open_page(report.as_uri()).page.locator("#tab-mechanism").count()
    with pytest.raises(ScoreError, match="not a HeadScores"):
        explored.showing(explored.scores)
    with pytest.raises(ScoreError, match="'another' is not the model of this page"):
        explored.showing(replace(paths, manifest={"model": {"name": "another"}}))


def test_no_text_of_users_runs(explored, tmp_path, open_page):
    """Names, documents, references and generated tokens that are markup stay text, in every tab."""
    scores = explored.scores
    users = {user: f"{EVIL} {index}" for index, user in enumerate(scores.users)}
    renamed = dps.HeadScores(
        scores.values, example_ids=[EVIL + one for one in scores.example_ids],
        user_ids=[users[user] for user in scores.user_ids], components=scores.components, manifest=scores.manifest,
    )  # fmt: skip
    view = explored.views[0]
    grid = explored.grid
    texts = [
        type(one)(**{**vars(one), "user": users[one.user], "pieces": [EVIL] * len(one.pieces),
                     "alternatives": [[(EVIL, 0.5)]] * len(one.pieces)})
        for one in grid.texts
    ]  # fmt: skip
    evil = Exploration(
        scores=renamed,
        heads=explored.heads,
        families={EVIL: explored.families["induction"]},
        between_users=dps.overlap(renamed, k=3, n_null=20, n_splits=5),
        between_families=explored.between_families,
        views=(
            ExampleView(EVIL, EVIL, (EVIL,) * len(view.pieces), view.spans, view.heads, view.attention, EVIL_ANSWERS),
        ),
        grid=type(grid)(tuple(texts), grid.gammas, grid.ks, dict.fromkeys(grid.references, EVIL), grid.manifest),
        title=EVIL,
    )
    opened = open_page(evil.write(tmp_path / "evil.html").as_uri())
    page = opened.page
    assert page.title() == EVIL
    for tab in ("overlap", "ablation", "texts", "about", "heads"):
        page.click(f"#tab-{tab}")
        for select in page.locator(f"#{tab} select").all():
            for option in select.locator("option").all():
                select.select_option(option.get_attribute("value"))
    page.locator("#detail-examples circle").first.hover()
    assert EVIL in page.locator("#tip").inner_text()
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert not [one for one in opened.problems if "Content Security" in one], "nothing even tried"


def test_circuitsvis_runs_no_text_and_needs_no_network(llama, probe, tmp_path, open_page):
    """Its own page inlines the script of the wheel; a token that ends scripts ends none."""
    from dataclasses import replace

    config = dps.PromptConfig(items=1, profile_tokens=30, task_tokens=20, response_tokens=5)
    prompt = dps.build_prompt(llama.hooked, probe[0].examples[0], config=config)
    found = dps.attention_pattern(llama.hooked, prompt, HeadSet.parse("L1H2,L0H0"))
    assert len(found.pieces) <= 128
    evil = replace(found, pieces=(EVIL, *found.pieces[1:]))
    file = tmp_path / "attention.html"
    file.write_text(dps.plots.attention_html(evil), encoding="utf-8")
    opened = open_page(file.as_uri())
    opened.page.wait_for_selector("#heads >> text=L1H2")
    assert opened.page.evaluate("window.hacked") is None
    assert opened.requests == [file.as_uri()]
    assert not [one for one in opened.problems if "Content Security" in one or "failed" in one]


@pytest.mark.full
def test_attention_of_a_long_prompt_is_on_the_screen_in_time(llama, probe, tmp_path, open_page):
    """2,000 tokens, 48 of them written, in under 5 s."""
    from dataclasses import replace

    prompt = dps.build_prompt(llama.hooked, probe[0].examples[0], config=PROMPT)
    start = 2000 - 48
    pattern = torch.rand(1, 48, 2000, generator=torch.Generator().manual_seed(0)).softmax(-1)
    spans = {"profile": (4, 1700), "task": (1700, 1940), "response": (start, 2000)}
    long = dps.AttentionPattern((Head(0, 0),), pattern, ("token",) * 2000, replace(prompt, spans=spans))
    begun = time.perf_counter()
    file = tmp_path / "attention.html"
    file.write_text(dps.plots.attention_html(long), encoding="utf-8")
    opened = open_page(file.as_uri())
    opened.page.wait_for_selector(".heatmaplayer image")
    assert time.perf_counter() - begun < 5
    assert not opened.problems


@pytest.mark.full
def test_large_runs_stay_usable(tmp_path, open_page):
    """80 layers × 64 heads, 200 users: under 25 MB, on the screen in under 3 s."""
    users = [f"user {index}" for index in range(200)]
    generator = torch.Generator().manual_seed(0)
    values = 0.05 * torch.randn(400, 80, 64, generator=generator)
    own = values + 0.1 * torch.rand(400, 80, 64, generator=generator)
    scores = dps.HeadScores(
        values, example_ids=[f"e{index}" for index in range(400)], user_ids=[user for user in users for _ in "ab"],
        components={"own": own, "no_profile": own - values},
        manifest={"contrast": "no_profile", "model": {"name": "large", "n_layers": 80, "n_heads": 64}},
    )  # fmt: skip
    path = Exploration(scores=scores, heads=scores.top(10)).write(tmp_path / "large.html")
    assert path.stat().st_size < 25 * 10**6
    begun = time.perf_counter()
    opened = open_page(path.as_uri())
    opened.page.wait_for_selector("#heatmap .hm image")
    expect(opened.page.locator("#detail-examples circle")).to_have_count(400)
    assert time.perf_counter() - begun < 3
    click_head(opened.page, Head(40, 30))
    expect(opened.page.locator("#detail-name")).to_have_text("L40H30")
    facts = detail(opened.page)[1]
    assert float(facts[1].split()[0].replace("−", "-")) == pytest.approx(float(scores.mean()[40, 30]), abs=1e-3)
    assert not opened.problems


def test_many_users_are_found_and_grouped(tmp_path, open_page):
    users = [
        f"{site}:{name}" for site in ("blog", "news") for name in ("ann", "bo", "cy", "dee", "eve", "fay", "gil", "hal")
    ]
    values = torch.randn(16, 3, 4, generator=torch.Generator().manual_seed(0))
    scores = dps.HeadScores(
        values, example_ids=["e"] * 16, user_ids=users, manifest={"model": {"name": "m", "n_layers": 3, "n_heads": 4}}
    )
    page = open_page(Exploration(scores=scores, heads=scores.top(3)).write(tmp_path / "many.html").as_uri()).page
    groups = page.locator("#user optgroup")
    assert [group.get_attribute("label") for group in groups.all()] == ["blog", "news"]
    assert groups.nth(1).locator("option").count() == 8
    page.fill("#find-user", "DEE")
    assert page.locator("#user optgroup option").all_inner_texts() == ["blog:dee", "news:dee"]
    assert page.locator("#user").input_value() == ""
    page.press("#find-user", "Enter")
    assert page.locator("#user").input_value() == "blog:dee"
    assert "user=blog%3Adee" in page.url
    page.fill("#find-user", "news:h")
    assert page.locator("#user option").all_inner_texts()[1:] == ["blog:dee", "news:hal"], "the chosen one stays"
    page.fill("#find-user", "nobody")
    assert page.locator("#find-user").evaluate("field => field.validationMessage") == "no user of this name"


def test_what_does_not_fit_is_said(explored, monkeypatch, tmp_path, open_page):
    monkeypatch.setattr("dps_lens.explorer.values.MAX_VALUES", 10)
    assert content(explored)["examples"] is None
    opened = open_page(explored.write(tmp_path / "few.html").as_uri())
    assert "HeadScores.load" in opened.page.locator("#detail-examples").inner_text()
    opened.page.select_option("#user", explored.scores.users[0])
    assert not opened.problems
    bare = Exploration(scores=explored.scores, heads=explored.heads)
    opened = open_page(bare.write(tmp_path / "bare.html").as_uri())
    for tab in ("ablation", "overlap", "texts"):
        opened.page.click(f"#tab-{tab}")
    assert not opened.problems


def test_explore_resumes_and_refuses_other_models(explored, llama, probe, tmp_path, monkeypatch):
    options = {"gammas": (1.0,), "ks": (1,), "max_users": 2, "max_new_tokens": 4}
    first = dps.explore(llama.hooked, probe[:6], explored.scores, out=tmp_path, **options, k=3)
    monkeypatch.setattr("dps_lens.evaluation.grid.generate", None)
    monkeypatch.setattr("dps_lens.explorer.views.attention_pattern", None)
    again = dps.explore(llama.hooked, probe[:6], explored.scores, out=tmp_path, **options, k=3)
    assert again.grid == first.grid
    assert all(torch.equal(a.attention, b.attention) for a, b in zip(first.views, again.views, strict=True))
    small = dps.HeadScores(torch.zeros(1, 2, 2), example_ids=["a"], user_ids=["a"])
    with pytest.raises(ScoreError, match="the model has"):
        dps.explore(llama.hooked, probe[:1], small)
    others = {"scores": explored.scores, "other": explored.scores.without([probe[0].id])}
    with pytest.raises(ScoreError, match="scores 'other' are of other users"):
        dps.explore(llama.hooked, probe[:6], others)


def test_heads_of_the_shown_examples_and_bare_scores(explored, llama, probe, tmp_path, open_page):
    """Nothing is shown on examples that chose the heads; scores without a contrast have one map, one user no folds."""
    options = {"gammas": (1.0,), "ks": (1,), "max_users": 1, "max_new_tokens": 2, "k": 2}
    leaking = dps.HeadScores(
        explored.scores.values[:1], example_ids=[probe[0].examples[-1].id], user_ids=[probe[0].id]
    )  # fmt: skip
    with pytest.raises(ScoreError, match="evaluate on other examples"):
        dps.explore(llama.hooked, probe[:1], leaking, **options)
    scoring = {"against": None, "max_examples": 1, "prompt_config": PROMPT}
    alone = score_pcs(llama.hooked, probe[:1], **scoring)
    found = dps.explore(llama.hooked, probe[:1], alone, **options)
    assert [*content(found)["maps"]] == ["PCS"]
    assert "the user's older texts" in page(found).replace("&#39;", "'")
    opened = open_page(found.write(tmp_path / "alone.html").as_uri())
    assert detail(opened.page)[0] == str(alone.top(1)[0])
    assert not opened.problems
    assert make_app(llama.hooked, probe[:1], found).test_client().get("/", base_url=f"http://{HOST}").status_code == 200


def test_attention_of_a_large_model_is_that_of_the_best_heads(explored, monkeypatch, llama, probe):
    monkeypatch.setattr("dps_lens.explorer.content._MAX_ATTENTION", 1)
    monkeypatch.setattr("dps_lens.explorer.content._SHARE_OF_TOP", 2)
    options = {"gammas": (1.0,), "ks": (1,), "max_users": 1, "max_new_tokens": 2, "k": 2}
    found = dps.explore(llama.hooked, probe[:6], explored.scores, families=explored.families, **options)
    expected = explored.scores.top(2) | explored.families["induction"].top(2)
    assert found.views[0].heads == expected.heads


@contextmanager
def served(app):
    from werkzeug.serving import make_server

    server = make_server(HOST, 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.port}/"
    finally:
        server.shutdown()
        thread.join()


def test_the_live_page_writes_anew(explored, llama, probe, open_page):
    """What the page shows is what `generate` writes with the heads that other users chose."""
    app = make_app(llama.hooked, probe[:6], explored)
    with served(app) as url:
        opened = open_page(url + "#tab=texts", offline=False)
        page = opened.page
        page.fill("#gamma-free", "3")
        page.fill("#k-free", "2")
        page.click("#write")
        expect(page.locator("#steered-title")).to_contain_text("γ = 3, K = 2")
        expect(page.locator("#spinner")).to_be_hidden()
        written = page.locator("#text-steered span").all_text_contents()
        chosen = Writer(llama.hooked, probe[:6], explored)._heads[explored.views[0].user][:2]
        assert page.locator("#text-note").inner_text().endswith(f"Heads: {chosen}")
        for field, value in (("#k-free", "99"), ("#gamma-free", "")):
            before = page.locator(field).input_value()
            page.fill(field, value)
            page.click("#write")
            assert page.locator(field).evaluate("field => field.validationMessage")
            page.fill(field, before)
        expect(page.locator("#steered-title")).to_contain_text("γ = 3, K = 2")
        assert {one.partition("#")[0] for one in opened.requests} <= {url, url + "steer", url + "favicon.ico"}
    view = explored.views[0]
    user = next(user for user in probe if user.id == view.user)
    heads = Writer(llama.hooked, probe[:6], explored)._heads[user.id][:2]
    prompt = dps.build_prompt(llama.hooked, user.examples[-1], config=PROMPT)
    expected = dps.generate(llama.hooked, prompt, heads=heads, gamma=3.0, max_new_tokens=8)
    assert written == expected.pieces[0]


def test_an_answer_stays_with_what_was_asked(explored, llama, probe, open_page, monkeypatch):
    """Another example, another slider, a cancel: no text stands under the name or the settings of another."""
    go_on = threading.Event()

    def slowly(self, example, heads, gamma):
        yield {"heads": str(heads)}
        yield {"text": f"to {example.user_id}"}
        go_on.wait(20)
        yield {"text": " and more"}

    monkeypatch.setattr(Writer, "write", slowly)
    with served(make_app(llama.hooked, probe[:6], explored)) as url:
        page = open_page(url + "#tab=texts", offline=False).page
        steered, title = page.locator("#text-steered"), page.locator("#steered-title")
        of_grid = steered.inner_text()
        page.fill("#gamma-free", "7")
        page.click("#write")
        expect(steered).to_have_text(f"to {explored.views[0].user}")
        expect(title).to_contain_text("γ = 7")
        page.select_option("#text", index=1)
        expect(title).not_to_contain_text("γ = 7")
        expect(steered).not_to_contain_text("to ")
        go_on.set()
        page.wait_for_timeout(300)
        expect(steered).not_to_contain_text("and more")
        assert page.locator("#spinner").is_hidden()
        assert page.locator("#write").is_enabled()
        page.select_option("#text", index=0)
        expect(steered).to_have_text(of_grid)
        go_on.clear()
        page.click("#write")
        expect(steered).to_have_text(f"to {explored.views[0].user}")
        page.click("#cancel")
        expect(page.locator("#steered-scores")).to_have_text("cancelled")
        expect(title).to_contain_text("γ = 7")
        expect(steered).to_have_text(f"to {explored.views[0].user}")
        page.locator("#gamma").press("ArrowLeft")
        expect(title).not_to_contain_text("γ = 7")
        expect(page.locator("#steered-scores")).not_to_have_text("cancelled")
        go_on.set()


def test_the_map_says_what_it_shows(explored, report, open_page):
    user = explored.scores.users[1]
    page = open_page(report.as_uri() + f"#user={user}").page
    expect(page.locator("#map-note")).to_contain_text("2 examples of one user")
    page.select_option("#map", "integrated patch")
    expect(page.locator("#map-note")).to_contain_text("Mean of one user's examples")
    expect(page.locator("#map-note")).not_to_contain_text("Dots")
    limit = page.evaluate("document.querySelector('#heatmap').data[0].zmax")
    marked = page.evaluate("document.querySelector('#heatmap').data[2].x.length")
    values = page.evaluate("document.querySelector('#heatmap').data[0].z.flat()")
    assert marked == sum(abs(value) > limit for value in values)
    assert ("beyond the ends" in page.locator("#map-note").inner_text()) == bool(marked)


def test_cancelling_stops_the_model(explored, llama, probe):
    """A reader that goes away ends the generation, and the next text is written; the model is bare in between."""
    writer = Writer(llama.hooked, probe[:6], explored)
    example, heads, gamma = writer.asked(
        {"user": explored.views[0].user, "example": explored.views[0].example, "gamma": 2, "k": 3}
    )
    lines = writer.write(example, heads, gamma)
    assert next(lines) == {"heads": str(heads)}
    assert "text" in next(lines)
    assert no_hooks_left(llama.hooked)
    lines.close()
    assert [*writer.write(example, heads, gamma)][-1]["done"]["k"] == 3


def test_only_this_machine_may_ask(explored, llama, probe):
    app = make_app(llama.hooked, probe[:6], explored)
    client, view = app.test_client(), explored.views[0]
    asked = {"user": view.user, "example": view.example, "gamma": 1, "k": 1}
    base = {"base_url": f"http://{HOST}:8050"}
    assert client.get("/", **base).status_code == 200
    assert client.get("/", base_url="http://evil.example:8050").status_code == 403
    assert client.post("/steer", json=asked, base_url="http://evil.example").status_code == 403
    assert client.post("/steer", data=json.dumps(asked), content_type="text/plain", **base).status_code == 400
    for field, value in (
        ("gamma", "x"), ("gamma", -2), ("k", 0), ("k", 1.5), ("k", True), ("example", "no"), ("example", ["no"]),
        ("gamma", 10**4000),
    ):  # fmt: skip
        reply = client.post("/steer", json=asked | {field: value}, **base)
        assert reply.status_code == 400
        assert field in reply.get_json()["error"]
    for body, status in (("[" * 100_000, 400), ('{"gamma": ' + "1" * 5000, 400), (b"\xff", 400), ("x" * 2**23, 413)):
        assert client.post("/steer", data=body, content_type="application/json", **base).status_code == status
    assert b'"done"' in client.post("/steer", json=asked, **base).data
    with pytest.raises(SteeringError, match="no texts"):
        make_app(llama.hooked, probe[:6], Exploration(scores=explored.scores, heads=explored.heads))


def saved(page, button):
    with page.expect_download() as download:
        button.click()
    return download.value.path().read_text(encoding="utf-8"), download.value.suggested_filename


def test_figures_and_numbers_can_be_taken(explored, report, open_page):
    """The CSV of a map is that of the scores; pictures are of the figure; what is copied is Python that runs."""
    opened = open_page(report.as_uri())
    page, scores = opened.page, explored.scores
    text, name = saved(page, page.locator("#map-take").get_by_role("button", name="CSV"))
    assert name.endswith(".csv")
    frame = pd.read_csv(io.StringIO(text)).set_index("head")
    expected = scores.to_frame().set_index("name")
    assert [*frame.index] == [*expected.index]
    for theirs, ours in (("nats per token", "mean"), ("low", "low"), ("high", "high")):
        assert frame[theirs].to_numpy() == pytest.approx(expected[ours].to_numpy(), abs=1e-5)
    text, name = saved(page, page.locator("#map-take").get_by_role("button", name="SVG"))
    assert name.endswith(".svg")
    assert text.startswith("<svg")
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.copied = text; }")
    page.locator("#map-take").get_by_role("button", name="Copy heads").click()
    assert eval(page.evaluate("window.copied"), {"dps": dps}).heads == explored.heads.heads
    page.locator("#map-take").get_by_role("button", name="Copy link").click()
    assert page.evaluate("window.copied") == page.url
    page.click("#tab-ablation")
    text, _ = saved(page, page.locator("#ablation > button", has_text="CSV"))
    cost = pd.read_csv(io.StringIO(text))
    assert cost["mean"].to_numpy() == pytest.approx(explored.cost.beside_random()["mean"].to_numpy(), nan_ok=True)
    for tab in ("ablation", "overlap", "texts"):
        page.click(f"#tab-{tab}")
        for figure in page.locator(f"#{tab} .js-plotly-plot ~ .take, #{tab} .figure + .take").all():
            text, _ = saved(page, figure.get_by_role("button", name="CSV"))
            taken = pd.read_csv(io.StringIO(text))
            assert len(taken) > 3
            assert taken[["x", "y"]].notna().all(axis=None)
    page.click("#tab-overlap")
    page.select_option("#overlap select", "users")
    text, _ = saved(page, page.locator("#overlap .take").get_by_role("button", name="CSV"))
    cells = pd.read_csv(io.StringIO(text)).dropna(subset="z")
    users = list(explored.between_users.names)
    shares = [
        explored.between_users.jaccard[users.index(row["x"]), users.index(row["y"])] for row in cells.to_dict("records")
    ]
    assert cells["z"].to_numpy() == pytest.approx(np.array(shares, dtype=float), nan_ok=True)
    assert not opened.problems
    assert opened.requests == [report.as_uri()]


def test_the_list_sorts_filters_and_leads_to_heads(explored, report, open_page):
    page = open_page(report.as_uri()).page
    page.click("#list summary")
    names = page.locator("#list-table td:nth-child(2)")
    by_score = [*explored.scores.to_frame()["name"]]
    assert names.all_inner_texts() == by_score
    page.locator("#list-table th").nth(1).get_by_role("button").click()
    assert names.all_inner_texts() == [f"L{layer}H{head}" for layer in range(3) for head in range(4)]
    page.locator("#list-table th").nth(1).get_by_role("button").click()
    assert names.first.inner_text() == "L2H3"
    page.fill("#list-filter", "l1h")
    assert {*names.all_inner_texts()} == {f"L1H{head}" for head in range(4)}
    names.last.get_by_role("button").click()
    assert detail(page)[0] == names.last.inner_text()
    page.fill("#list-filter", "outlined")
    assert {*names.all_inner_texts()} == {*map(str, explored.heads)}


def test_back_goes_back_and_terms_are_explained(explored, report, open_page):
    page = open_page(report.as_uri()).page
    page.fill("#head", "L1H1")
    page.press("#head", "Enter")
    page.click("#tab-ablation")
    term = page.locator("#ablation abbr", has_text="task_cost").first
    assert "without a profile" in term.get_attribute("title")
    page.go_back()
    assert page.locator("#heads").is_visible()
    assert detail(page)[0] == "L1H1"
    page.go_back()
    assert detail(page)[0] == str(explored.heads[0])


@pytest.mark.parametrize("tab", ["heads", "overlap", "ablation", "texts", "about"])
def test_a_narrow_screen_shows_everything(report, open_page, tab):
    page = open_page(f"{report.as_uri()}#tab={tab}").page
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(report, open_page, scheme):
    import axe_playwright_python

    axe = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    page = open_page(report.as_uri(), bypass_csp=True, color_scheme=scheme).page
    page.click("#list summary")
    page.evaluate(axe)
    for tab in ("heads", "overlap", "ablation", "texts", "about"):
        page.click(f"#tab-{tab}")
        found = page.evaluate("axe.run()")["violations"]
        assert [
            (one["id"], one["nodes"][0]["target"]) for one in found if one["impact"] in ("serious", "critical")
        ] == []


def test_the_keyboard_reaches_what_is_said_of_tokens(explored, report, open_page):
    page = open_page(report.as_uri()).page
    page.focus("#attention")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator("#attention .at").inner_text() == explored.views[0].pieces[2].strip()
    assert "of the attention" in page.locator("#tip").inner_text()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#attention span").nth(1).evaluate("one => one.classList.contains('at')")
    page.focus("#detail-examples svg")
    assert page.locator("#tip").is_hidden()
    page.keyboard.press("ArrowRight")
    assert explored.scores.users[0] in page.locator("#tip").inner_text()


def test_paper_has_every_tab(explored, report, open_page):
    page = open_page(report.as_uri() + "#tab=texts").page
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    for tab in ("heads", "overlap", "ablation", "texts", "about"):
        assert page.locator(f"#{tab}").is_visible()
    assert page.locator("#overlap .js-plotly-plot").count() == 1
    assert page.locator("#heatmap .hm image").count() == 1
    assert page.locator("#attention span").count()
    assert page.locator("#text-plain span").count()
    assert not page.locator("[role=tablist]").is_visible()
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.locator("#overlap").is_visible()


def test_the_policy_names_every_script(explored):
    """Scripts run by their digests only; a page without a server may connect to nothing."""
    import base64
    import hashlib

    text = page(explored)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1])
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 4
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "'unsafe-inline'" not in policy.split("style-src")[0]
    assert policy.endswith("connect-src 'none'")
    assert "connect-src &#39;self&#39;" in page(explored, live={"examples": []})


def test_cost_without_an_interval_is_no_number(explored):
    cost = explored.cost
    alone = replace(
        cost,
        user_ids=cost.user_ids[:1],
        example_ids=cost.example_ids[:1],
        full={name: values[:1] for name, values in cost.full.items()},
        chosen={name: values[:1] for name, values in cost.chosen.items()},
        draws={name: values[:, :1] for name, values in cost.draws.items()},
    )
    found = Exploration(scores=explored.scores, heads=explored.heads, cost=alone)
    assert content(found)["cost"][0]["low"] is None
    assert "nothing is claimed" in page(found)
