"""Words of users, models and files are shown letter by letter in every figure."""

import html
import json
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

import dps_lens as dps
from dps_lens import plots
from dps_lens.data import Prompt
from dps_lens.data.tasks import TASKS
from dps_lens.dossier.measures import MEASURES
from dps_lens.evaluation import Evaluation, SteeringGrid
from dps_lens.evaluation.grid import SteeredText
from dps_lens.evaluation.sweep import SteeringSweep
from dps_lens.heads import Head, HeadSet
from dps_lens.plots.export import fit
from dps_lens.plots.text import plain
from dps_lens.steering import Generation
from dps_lens.validation.attention import AttentionPattern
from dps_lens.validation.circuits import Faithfulness
from dps_lens.validation.effects import SetEffects

EVIL = '<b>u</b><br><a href="javascript:alert(1)">L</a> %{x} $\\alpha$ &lt; <extra>\n'
SHOWN = EVIL.replace("\n", "⏎")
N = 8


def scores(**manifest):
    values = torch.randn(2 * N, 3, 4, generator=torch.Generator().manual_seed(0))
    users = [f"{EVIL}{index // 2}" for index in range(2 * N)]
    examples = [f"{EVIL}{index}" for index in range(2 * N)]
    return dps.HeadScores(values, example_ids=examples, user_ids=users, manifest=manifest)


def effects():
    names = tuple(f"{EVIL}{index}" for index in range(N))
    ones = torch.rand(N, 2, dtype=torch.float64)
    both = ("own", "no_profile")
    return SetEffects(
        (EVIL,),
        (2,),
        names,
        names,
        {name: 5 + ones for name in both},
        {name: ones[:, None, None] for name in both},
        {name: ones[None, :, None, None].repeat(20, 1, 1, 1, 1) for name in both},
        {"seed": 0, "spread": False, "model": {"n_heads": 4}, "sets": {EVIL: {name: ["L0H0,L1H1"] for name in names}}},
    )


def evaluation():
    measured = ("ROUGE-L", "ROUGE-1", "style", "NLL", "repeated", "tokens")
    rows = [
        {"user": f"{EVIL}{user}", "example": "e", "method": method, "text": "t", "reference": "r"}
        | {name: 0.1 * user for name in measured}
        for user in range(N)
        for method in ("rag", EVIL)
    ]
    choices = pd.DataFrame({"method": ["rag", EVIL], "setting": [EVIL, EVIL], "chosen": [True, True]})
    return Evaluation(pd.DataFrame(rows), choices, pd.DataFrame(), TASKS["lamp-4"], {"metrics": ["ROUGE-L"]})


def grid():
    def text(user, gamma, k):
        measured = {"style": 0.1 * user + gamma, "NLL": 2.0 + 0.1 * gamma, "ROUGE-L": 0.2 * user}
        about = (f"{EVIL}{user}", f"{EVIL}{user}", gamma, k, "L0H0", EVIL, [EVIL], [0.1], [0.1], [[]])
        return SteeredText(*about, measured)

    texts = tuple(text(user, gamma, k) for user in range(3) for gamma, k in ((0.0, 0), (1.0, 2)))
    references = {f"{EVIL}{user}": EVIL for user in range(3)}
    return SteeringGrid(texts, (1.0,), (2,), references, {"rule": EVIL})


def sweep():
    values = torch.rand(2, N, dtype=torch.float64)
    names = tuple(f"{EVIL}{index}" for index in range(N))
    methods = {EVIL: values, f"{EVIL} (random)": values}
    return SteeringSweep((0.5, 1.0), names, names, torch.ones(N, dtype=torch.float64), methods, methods)


def curves():
    names = tuple(f"{EVIL}{index}" for index in range(N))
    empty = 5 + torch.rand(N, dtype=torch.float64)
    kept = torch.tensor([[0.3, 0.7, 1.0]], dtype=torch.float64)
    sizes = ((0.1, 0.5, 1.0), (1, 4, 8))
    circuits = empty[:, None, None] - kept
    return Faithfulness((EVIL,), *sizes, names, names, empty - 1, empty, circuits, circuits)


def generation():
    one, moved = torch.rand(2), [[[(EVIL, 0.1)], [(EVIL, -0.1)]]]
    of = ([EVIL * 2], [torch.tensor([1, 2])], [one], [one], [one], [[EVIL, EVIL]], moved)
    return Generation(*of, manifest={"rule": EVIL})


def pattern():
    spans = {"profile": (0, 2), "task": (2, 3), "response": (3, 5)}
    prompt = Prompt(torch.arange(5), spans, EVIL, "own", EVIL, EVIL, (EVIL,))
    return AttentionPattern((Head(0, 0),), torch.rand(1, 2, 5), (EVIL,) * 5, prompt)


def dossier():
    users = (f"{EVIL}1", f"{EVIL}2")
    values = torch.randn(2, 3, len(MEASURES), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return dps.Dossier(
        Head(0, 1),
        HeadSet.parse("L0H0,L0H2"),
        users,
        users,
        values,
        torch.randn(2, 3, 4),
        ((EVIL,), (EVIL,)),
        ((0.1,), (0.2,)),
        {EVIL: (0.5, 0.1, 0.2)},
        torch.rand(3, 4),
        ((EVIL, "q", 0.3),),
        (EVIL,),
        (EVIL,),
    )


def paths():
    heads, generator = HeadSet.parse("L0H1,L1H0", EVIL), torch.Generator().manual_seed(0)
    users = tuple(f"{EVIL}{number}" for number in range(8))
    values = torch.rand(8, 2, dtype=torch.float64, generator=generator) + torch.tensor([1.0, -0.5])
    others = 0.01 * torch.randn(8, 2, dtype=torch.float64, generator=generator)
    return dps.PathEffects(
        heads,
        heads,
        {"L0H1": HeadSet.parse("L0H0"), "L1H0": HeadSet.parse("L1H1")},
        ("q",),
        users,
        users,
        paths=torch.full((8, 1, 4, 2), torch.nan, dtype=torch.float64).index_fill(3, torch.tensor([1]), 0.5),
        direct=torch.cat([values, others], 1),
        total=torch.cat([values, others], 1),
        documents=torch.cat([values, others], 1)[:, :, None],
    )


def vectors():
    values = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    users = (f"{EVIL}1", f"{EVIL}2")
    owners, names = (users[0], users[0], users[1], users[1]), ("a", "b", "c", "d")
    return dps.HeadVectors(HeadSet.parse("L0H0,L0H1", EVIL), users, values[::2], values, owners, names)


FIGURES = {
    "ablation": lambda: plots.ablation(effects()),
    "attention": lambda: plots.attention(pattern()),
    "dossier": lambda: plots.dossier(dossier()),
    "evaluation": lambda: plots.evaluation(evaluation(), baseline="rag"),
    "evaluation against it": lambda: plots.evaluation(evaluation(), baseline=EVIL),
    "faithfulness": lambda: plots.faithfulness(curves()),
    "families": lambda: plots.families(scores(family=EVIL, unit=EVIL), scores(family=EVIL, unit=EVIL), k=3),
    "families by name": lambda: plots.families(scores(), scores(unit=EVIL), k=3, names=(EVIL, EVIL)),
    "head_vectors": lambda: plots.head_vectors(vectors(), n_null=20),
    "heatmap": lambda: plots.heatmap(scores(unit=EVIL), heads=HeadSet.parse("L0H1", EVIL)),
    "heatmap of a user": lambda: plots.heatmap(scores(), user=f"{EVIL}1"),
    "heatmap of a family": lambda: plots.heatmap(scores(family=EVIL)),
    "heatmaps": lambda: plots.heatmaps(scores(unit=EVIL)),
    "k_sweep": lambda: plots.k_sweep(grid(), measure="ROUGE-L"),
    "overlap": lambda: plots.overlap(dps.overlap(scores(), k=3, n_null=20, n_splits=5)),
    "pareto": lambda: plots.pareto(grid()),
    "pareto by name": lambda: plots.pareto({EVIL: grid(), "other": grid()}),
    "paths": lambda: plots.paths(paths()),
    "stability_curve": lambda: plots.stability_curve(
        pd.DataFrame({"units": [2], "jaccard": [0.5], "low": [0.4], "high": [0.6], "chance": [0.1]}), units=EVIL
    ),
    "steering": lambda: plots.steering(sweep()),
    "token_effects": lambda: plots.token_effects(dossier()),
    "token_shift": lambda: plots.token_shift(generation()),
}
UNNAMED = {"dossier", "k_sweep", "paths"}
"""Figures that show no word of anybody's."""


def texts(value):
    """Every text that plotly shows; legend groups are none."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name not in ("legendgroup", "template"):
                yield from texts(each)
    elif isinstance(value, (list, tuple, np.ndarray)):
        for each in value:
            yield from texts(each)
    elif isinstance(value, str):
        yield value


def test_every_figure_is_here():
    drawn = {name for name in plots.__all__ if name.islower()} - {"attention_html", "browser", "export", "points"}
    assert drawn == {name.split()[0] for name in FIGURES}


@pytest.mark.parametrize("name", FIGURES)
def test_words_of_others_are_no_markup(name):
    found = list(texts(json.loads(FIGURES[name]().to_json())))
    tags = {tag for text in found for tag in re.findall(r"<\s*/?\s*(\w+)", text)}
    assert tags <= {"b", "br", "sup", "extra"}, "those of the figure itself"
    for text in found:
        assert "<b>u" not in text
        assert "%{x} $" not in text
        assert "$" not in text
        assert "<extra>⏎" not in text
    shown = [html.unescape(re.sub(r"<[^>]*>", "", text)) for text in found]
    words = [re.sub(r"[_ ]", "", text).casefold() for text in shown]
    assert any(re.sub(r"[_ ]", "", SHOWN).casefold() in text for text in words) != (name in UNNAMED), "letter by letter"


def test_print_keeps_letters_whole():
    figure = plots.heatmap(scores(unit=EVIL))
    figure.update_xaxes(title=plain("<" * 200))
    fit(figure, 291)
    assert html.unescape(figure.layout.xaxis.title.text) == "<" * 200


def test_a_browser_shows_the_letters(browser, tmp_path):
    """Plotly itself as the oracle: what it draws of the escaped words are the words."""
    figure = go.Figure(go.Scatter(x=[1], y=[plain(EVIL)], name=plain(EVIL), text=[plain(EVIL)], mode="markers+text"))
    figure.update_layout(title=plain(EVIL), showlegend=True, xaxis={"title": plain(EVIL)}, width=1600, height=600)
    figure.add_annotation(x=1, y=0, text=plain(EVIL))
    figure.write_html(tmp_path / "figure.html", include_plotlyjs=True)
    page = browser.new_page()
    page.goto((tmp_path / "figure.html").as_uri())
    page.wait_for_selector(".annotation-text")
    drawn = page.evaluate("[...document.querySelectorAll('svg text')].map((one) => one.textContent)")
    assert sum(text == SHOWN for text in drawn) == 6, drawn
    assert page.evaluate("document.querySelectorAll('svg a').length") == 0
    page.close()
