"""Figures hold the values they were given; the report is one safe page."""

import json
import re

import numpy as np
import pytest
import torch

import dps_lens as dps
from dps_lens.analysis import AblationCost
from dps_lens.heads import HeadSet
from dps_lens.plots import TEMPLATE, heatmap, verdict, write_report


@pytest.fixture(scope="module")
def scores(tinies, probe):
    config = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)
    return dps.score_heads(tinies("llama").hooked, probe[:4], max_examples=1, prompt=config, progress=False)


def test_heatmap_holds_the_scores(scores):
    figure = heatmap(scores, heads=HeadSet.parse("L1H2,L0H0"))
    trace = figure.data[0]
    assert np.allclose(trace.z, scores.mean().numpy())
    assert trace.text[1][2] == "L1H2"
    low, high = scores.ci()
    assert np.allclose(np.asarray(trace.customdata)[..., 0], low.numpy())
    assert np.allclose(np.asarray(trace.customdata)[..., 1], high.numpy())
    assert np.asarray(trace.customdata)[tuple(scores.top(1)[0])][2] == 1
    assert (trace.zmid, trace.zmin) == (0, -trace.zmax)
    assert trace.colorscale[0][1] == "rgb(103,0,31)", "red is negative"
    assert {(shape.x0 + 0.5, shape.y0 + 0.5) for shape in figure.layout.shapes} == {(2, 1), (0, 0)}
    assert figure.layout.xaxis.title.text == "head"
    assert "4 users, 4 examples" in figure.layout.title.text
    user = scores.users[1]
    assert np.allclose(heatmap(scores, user=user).data[0].z, scores.mean(user).numpy())
    assert np.allclose(heatmap(scores, component="own").data[0].z, scores.mean(of="own").numpy())
    assert scores.plot().data[0].type == "heatmap"


def test_heatmap_of_a_reference_family_names_it_and_its_unit(scores):
    family = dps.HeadScores(
        scores.values,
        example_ids=scores.example_ids,
        user_ids=scores.example_ids,
        manifest={"family": "function_vector", "unit": "change of probability"},
    )
    figure = heatmap(family)
    assert figure.layout.title.text == f"Function vector: mean of {len(scores.values)} prompts"
    assert figure.data[0].colorbar.title.text.startswith("change of probability")
    assert "change of probability" in figure.data[0].hovertemplate


def test_template_is_not_made_global(scores):
    import plotly.io

    before = plotly.io.templates.default
    heatmap(scores)
    assert plotly.io.templates.default == before
    assert TEMPLATE is not plotly.io.templates[before]


def planted_cost(taken_by_heads, taken_by_draws, gain=1.0, users=8):
    """Costs with a known gain, and noise over users."""
    noise = torch.randn(users, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.05
    none = torch.full((4, users), 5.0, dtype=torch.float64) + noise
    own = none - gain + noise
    own[1] += taken_by_heads - noise
    own[2:] += taken_by_draws
    heads = HeadSet.parse("L0H0,L1H1")
    return AblationCost(
        {"own": own, "no_profile": none},
        tuple(f"u{index}" for index in range(users)),
        heads,
        (heads, heads),
        {"seed": 0},
    )


def test_cost_table_and_verdict_follow_the_numbers():
    frame = planted_cost(0.6, 0.1).to_frame().set_index(["ablated", "measure"])
    assert frame.loc[("difference", "taken"), "mean"] == pytest.approx(0.5, abs=0.05)
    assert frame.loc[("2 random sets", "taken"), "mean"] == pytest.approx(0.1, abs=1e-6)
    assert "take more of the gain than random" in verdict(planted_cost(0.6, 0.1))
    assert "take less of the gain" in verdict(planted_cost(0.1, 0.6))
    assert "cannot be told from random" in verdict(planted_cost(0.1, 0.1))
    assert "does not reliably help" in verdict(planted_cost(0.1, 0.1, gain=0.0))
    assert "nothing is claimed" in verdict(planted_cost(0.6, 0.1, users=1))
    alone = planted_cost(0.6, 0.1)
    without = AblationCost({name: nll[:2] for name, nll in alone.nll.items()}, alone.user_ids, alone.heads, ())
    assert "without random heads" in verdict(without)
    assert planted_cost(0.6, 0.1).share_of_draws_below == 1.0


def test_report_is_one_page_that_runs_no_text_of_users(scores, tmp_path):
    evil = "</script><script>window.hacked = 1</script><img src=x onerror=alert(1)>"
    texts = [{"user": evil, "reference": evil, "plain": "plain & simple", "steered": "steered"}]
    path = write_report(tmp_path / "report.html", scores, planted_cost(0.6, 0.1), texts, steering="DPS, γ = 1")
    page = path.read_text(encoding="utf-8")
    assert evil not in page
    assert "&lt;script&gt;window.hacked" in page
    assert "plain &amp; simple" in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", markup), "nothing is fetched"
    assert "default-src 'none'" in page
    for row in scores.to_frame().head(2).to_dict("records"):
        assert f"<td>{row['name']}</td>" in page
        assert f"{row['mean']:.4f}" in page


def test_user_names_in_figures_cannot_close_the_script(scores, tmp_path):
    evil = "</script><script>window.hacked = 1</script>"
    renamed = dps.HeadScores(
        scores.values,
        example_ids=scores.example_ids,
        user_ids=[evil] * 4,
        components=scores.components,
        manifest=scores.manifest,
    )
    html = heatmap(renamed, user=evil).to_html(include_plotlyjs=False)
    assert evil not in html
    assert json.dumps("window.hacked")[1:-1] in html
