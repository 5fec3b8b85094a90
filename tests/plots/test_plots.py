"""Figures hold the values they were given."""

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from pcs import score_pcs

import dps_lens as dps
from dps_lens import plots
from dps_lens.errors import EvaluationError, HeadError, PlotError, ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.plots import TEMPLATE, heatmap
from dps_lens.plots.shapes import as_shapes
from dps_lens.validation.effects import SetEffects


@pytest.fixture(scope="module")
def scores(tinies, probe):
    config = dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)
    return score_pcs(tinies("llama").hooked, probe[:4], max_examples=1, prompt_config=config)


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
    assert figure.data[0].colorbar.title.text.startswith("function vector, change of probability")
    assert "change of probability" in figure.data[0].hovertemplate


def test_template_is_not_made_global(scores):
    import plotly.io

    before = plotly.io.templates.default
    heatmap(scores)
    assert plotly.io.templates.default == before
    assert TEMPLATE is not plotly.io.templates[before]


def planted_cost(by_heads, by_draws, gain=1.0, users=8, draws=20):
    """The cost of one set with a known gain, and noise over users and draws."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(users, generator=generator, dtype=torch.float64) * 0.05

    def both(values):
        return torch.stack([values, torch.zeros_like(values)], dim=-1)

    chosen = {"own": by_heads - noise, "no_profile": 0 * noise}
    spread = torch.randn(draws, users, generator=generator, dtype=torch.float64) * 0.01
    random = {"own": by_draws + spread, "no_profile": 0 * spread}
    names = [f"u{index}" for index in range(users)]
    return SetEffects(
        ("heads",),
        (2,),
        tuple(names),
        tuple(names),
        {"own": both(5.0 - gain + noise), "no_profile": both(5.0 + noise)},
        {name: both(values)[:, None, None] for name, values in chosen.items()},
        {name: both(values)[:, :, None, None] for name, values in random.items()} if draws else {},
        {
            "seed": 0,
            "spread": False,
            "model": {"n_heads": 4},
            "sets": {"heads": {name: ["L0H0,L1H1"] for name in names}},
        },
    )


def test_cost_table_and_verdict_follow_the_numbers():
    frame = planted_cost(0.6, 0.1).beside_random().set_index(["ablated", "measure"])
    assert frame.loc[("difference", "gain_removed"), "mean"] == pytest.approx(0.5, abs=0.05)
    assert frame.loc[("20 random sets", "gain_removed"), "mean"] == pytest.approx(0.1, abs=0.01)
    assert "More of the gain over no profile goes with" in planted_cost(0.6, 0.1).verdict()
    assert "Less of the gain over no profile goes with" in planted_cost(0.1, 0.6).verdict()
    assert "cannot be told from random" in planted_cost(0.1, 0.1).verdict()
    assert "does not reliably help" in planted_cost(0.1, 0.1, gain=0.0).verdict()
    assert "nothing is claimed" in planted_cost(0.6, 0.1, users=1).verdict()
    assert "too few to claim anything" in planted_cost(0.6, 0.1, draws=18).verdict()
    assert "too few to claim anything" in planted_cost(0.6, 0.1, draws=0).verdict()


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


def test_heatmap_marks_population_and_reliability(scores, unchecked):
    """Dots for heads that a population shows, pale cells where the interval spans 0; one user gets neither stars nor
    silence about how far the examples agree."""
    planted = torch.zeros(8, 3, 4)
    planted[:, 1, 2] = 1.0 + 0.01 * torch.arange(8)
    planted[:, 2, 0] = torch.tensor([1.0, -1.0] * 4)
    found = dps.HeadScores(planted, example_ids=[str(i) for i in range(8)], user_ids=[f"u{i}" for i in range(8)])
    significance = dps.significant_heads(found, n_flips=500)
    figure = heatmap(found, significance=significance, fade=True, heads=HeadSet.parse("L1H2", label="induction"))
    pale, dots = figure.data[1], figure.data[2]
    assert list(zip(dots.x, dots.y, strict=True)) == [(2, 1)]
    low, high = found.ci()
    assert np.array_equal(~np.isnan(pale.z), ((low <= 0) & (high >= 0)).numpy())
    title = figure.layout.title.text
    assert "outlined: induction" in title
    assert "dots: p ≤ 0.05, family-wise over heads" in title
    with pytest.raises(ScoreError, match="one user's map"):
        heatmap(found, user="u0", significance=significance)
    assert "no reliability" in heatmap(scores, user=scores.users[0]).layout.title.text
    twice = dps.HeadScores(scores.values, example_ids=scores.example_ids, user_ids=["u"] * 4)
    text = heatmap(twice, user="u").layout.title.text
    stated = float(text.rsplit(" ", 1)[1].removesuffix("</sup>"))
    expected = dps.split_half(twice, k=1, user="u", n_splits=50).set_index("measure")["mean"]["spearman"]
    assert stated == pytest.approx(expected, abs=0.006)


def test_small_multiples_share_their_colours(scores):
    figure = plots.heatmaps(scores, columns=3)
    assert [trace.type for trace in figure.data] == ["heatmap"] * 4
    for trace, user in zip(figure.data, scores.users, strict=True):
        assert np.allclose(trace.z, scores.mean(user).numpy())
        assert trace.coloraxis == "coloraxis"
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert [note.text for note in figure.layout.annotations] == list(scores.users)
    assert len(plots.heatmaps(scores, users=scores.users[:1]).data) == 1


def test_families_are_plotted_against_each_other(scores):
    """Every head is one dot at its two scores; groups are the top K of one, the other, both."""
    reference = dps.HeadScores(
        scores.values.flip(1), example_ids=scores.example_ids, user_ids=scores.user_ids,
        manifest={"family": "induction", "unit": "attention"},
    )  # fmt: skip
    figure = plots.families(scores, reference, k=3)
    dots = [trace for trace in figure.data if trace.type == "scatter"]
    found = {name: (x, y) for trace in dots for name, x, y in zip(trace.text, trace.x, trace.y, strict=True)}
    assert len(found) == 12
    for name, (x, y) in found.items():
        head = Head.parse(name)
        assert (x, y) == pytest.approx((float(reference.mean()[head]), float(scores.mean()[head])))
    ours, theirs = scores.top(3), reference.top(3)
    assert {*dots[3].text} == {str(head) for head in ours & theirs}
    assert {*dots[1].text} == {str(head) for head in ours - theirs}
    assert {*dots[2].text} == {str(head) for head in theirs - ours}
    assert f"{ours.jaccard(theirs):.2f}" in figure.layout.title.text
    margins = [trace for trace in figure.data if trace.type == "histogram"]
    assert len(margins[0].x) == len(margins[1].y) == 12
    assert "attention" in figure.layout.xaxis3.title.text
    small = dps.HeadScores(torch.zeros(1, 2, 4), example_ids=["a"], user_ids=["a"])
    with pytest.raises(ScoreError, match="score both on one model"):
        plots.families(scores, small)


@pytest.fixture(scope="module")
def grid(tinies, probe):
    config = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=20, response_tokens=6)
    heads = HeadSet.parse("L1H2,L0H1,L2H0")
    options = {"gammas": (0.5, 2.0), "ks": (1, 3), "max_new_tokens": 6, "prompt_config": config}
    return dps.steering_grid(tinies("llama").hooked, probe[:3], heads, **options)


def test_pareto_and_sweep_hold_the_grid(grid):
    frame = grid.to_frame().set_index(["gamma", "K", "measure"])
    figure = plots.pareto(grid)
    lines = {trace.name: trace for trace in figure.data}
    for k in (1, 3):
        line = lines[f"K = {k}"]
        at = [(0.0, 0), (0.5, k), (2.0, k)]
        assert list(line.x) == [frame.loc[(*one, "NLL"), "mean"] for one in at]
        assert list(line.y) == [frame.loc[(*one, "style"), "mean"] for one in at]
        assert list(line.error_y.array) == pytest.approx(
            [frame.loc[(*one, "style"), "high"] - frame.loc[(*one, "style"), "mean"] for one in at]
        )
    ringed = {*zip(lines["front"].x, lines["front"].y, strict=True)}
    everything = {(x, y) for k in (1, 3) for x, y in zip(lines[f"K = {k}"].x, lines[f"K = {k}"].y, strict=True)}
    unbeaten = {
        one for one in everything
        if not any(x <= one[0] and y >= one[1] and (x, y) != one for x, y in everything)
    }  # fmt: skip
    assert ringed == unbeaten
    both = plots.pareto({"dps": grid, "again": grid})
    assert [trace.name for trace in both.data[:4]] == ["dps, K = 1", "dps, K = 3", "again, K = 1", "again, K = 3"]
    other = dps.SteeringGrid(grid.texts, grid.gammas, grid.ks, {"another": "text"})
    with pytest.raises(EvaluationError, match="the same examples"):
        plots.pareto({"dps": grid, "other": other})
    sweep = plots.k_sweep(grid, measure="KL")
    assert list(sweep.data[1].y) == [frame.loc[(2.0, k, "KL"), "difference"] for k in (1, 3)]
    for call in (lambda: plots.pareto(grid, y="accuracy"), lambda: plots.k_sweep(grid, measure="nonsense")):
        with pytest.raises(EvaluationError, match="not in this grid"):
            call()


@pytest.fixture(scope="module")
def pattern(tinies, probe):
    config = dps.PromptConfig(items=2, profile_tokens=50, task_tokens=20, response_tokens=6)
    model = tinies("llama").hooked
    return dps.attention_pattern(
        model, dps.build_prompt(model, probe[0].examples[0], config=config), HeadSet.parse("L1H2,L2H0")
    )


def test_attention_holds_the_pattern(pattern, tinies):
    model, head = tinies("llama").hooked, Head(2, 0)
    figure = pattern.plot(head)
    _, cache = model.run_with_cache(pattern.prompt.tokens[None])
    start, stop = pattern.prompt.spans["response"]
    expected = cache["blocks.2.attn.hook_pattern"][0, 0, start - 1 : stop - 1]
    assert np.allclose(figure.data[0].z, expected.numpy(), atol=1e-4)
    assert np.allclose(pattern.mean[1], expected.mean(0).numpy(), atol=1e-5)
    assert pattern.pieces == tuple(model.tokenizer.decode([t]) for t in pattern.prompt.tokens.tolist())
    assert list(figure.data[0].y) == list(range(start, stop))
    assert "L2H0" in figure.layout.title.text
    with pytest.raises(HeadError, match="not among"):
        pattern.plot(Head(0, 0))
    bare = dps.chat_prompt(model, "hello")
    with pytest.raises(ScoreError, match="with its response"):
        dps.attention_pattern(model, bare, HeadSet.parse("L0H0"))


def test_long_prompts_are_shown_by_plotly(pattern):
    from dataclasses import replace

    more = 2000 - len(pattern.pieces)
    long = replace(
        pattern,
        pieces=pattern.pieces + ("x",) * more,
        pattern=torch.nn.functional.pad(pattern.pattern, (0, more)),
    )
    page = plots.attention_html(long)
    assert "Plotly.newPlot" in page
    assert "CircuitsVis.render" not in page
    assert "CircuitsVis.render" in plots.attention_html(pattern) or len(pattern.pieces) > 128


def test_cells_become_shapes_with_the_same_colours(scores):
    from plotly.colors import sample_colorscale

    figure = heatmap(scores, heads=HeadSet.parse("L1H2"))
    drawn = as_shapes(figure)
    assert not [trace for trace in drawn.data if trace.type == "heatmap"]
    cells = {((s.x0 + s.x1) / 2, (s.y0 + s.y1) / 2): s.fillcolor for s in drawn.layout.shapes if s.fillcolor}
    mean, limit = scores.mean(), figure.data[0].zmax
    for layer in range(3):
        for head in range(4):
            at = min(max((float(mean[layer, head]) + limit) / (2 * limit), 0), 1)
            assert cells[head, layer] == sample_colorscale("RdBu", [at])[0]
    assert tuple(drawn.layout.xaxis.range) == (-0.5, 3.5)
    bar = drawn.data[0].marker
    assert (bar.cmin, bar.cmax) == (-limit, limit)
    assert bar.colorbar.title.text == figure.data[0].colorbar.title.text
    named = dps.overlap({"a": scores.top(2), "b": scores.top(3)}, shape=(3, 4), n_null=20).plot()
    shapes = as_shapes(named)
    assert tuple(shapes.layout.yaxis.range) == (1.5, -0.5), "the first row stays on top"
    assert set(shapes.layout.xaxis.categoryarray) == {"a", "b"}
    assert sum(bool(s.fillcolor) for s in shapes.layout.shapes) == 2, "the diagonal is blank"
    assert as_shapes(named.__class__()).data == ()


def test_export_writes_vectors_with_fonts(scores, tmp_path, browser_path):
    """A page for print holds no bitmap, has its fonts inside and is as wide as a column; 1 px is 0.75 pt."""
    from pypdf import PdfReader

    files = plots.export(heatmap(scores, fade=True), tmp_path / "map", column="acl")
    assert [file.name for file in files] == ["map.html", "map.pdf", "map.png"]
    (page,) = PdfReader(tmp_path / "map.pdf").pages
    assert float(page.mediabox.width) == pytest.approx(291 * 0.75, abs=1)
    assert not list(page.images)
    fonts = [font.get_object() for font in page["/Resources"]["/Font"].values()]
    assert fonts
    for font in fonts:
        (inner,) = font.get("/DescendantFonts", (font,))
        assert {"/FontFile", "/FontFile2", "/FontFile3"} & {*inner.get_object()["/FontDescriptor"].get_object()}
    assert "layer" in page.extract_text()
    html = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert "plotly.js v" in html, "the script is inside"
    assert not list(tmp_path.glob(".*")), "no half files"


def test_letters_and_panels_of_a_paper(scores, tmp_path, browser_path):
    from pypdf import PdfReader

    given = heatmap(scores)
    plots.export(given, tmp_path / "map", formats=("pdf",), column="acl", font="serif", panel="b")
    (page,) = PdfReader(tmp_path / "map.pdf").pages
    fonts = {str(font.get_object()["/BaseFont"]) for font in page["/Resources"]["/Font"].values()}
    # The first of the family that this machine has, and the bold of the letter.
    assert all(any(name in font for name in ("Times", "Tinos", "Liberation", "Serif")) for font in fonts), fonts
    assert any("Bold" in font for font in fonts)
    assert "(b)" in page.extract_text()
    assert not given.layout.annotations, "the figure itself stays as it was"


def test_the_numbers_of_a_figure_are_those_that_it_was_drawn_from(scores, tmp_path):
    [file] = plots.export(heatmap(scores), tmp_path / "map", formats=("csv",))
    found = pd.read_csv(file)
    cells = found[found["z"].notna()]
    values = scores.mean().numpy()
    for row in cells.head(values.size).to_dict("records"):
        assert row["z"] == pytest.approx(values[int(row["y"]), int(row["x"])], abs=1e-6)
    bars = go.Figure(
        go.Scatter(x=[1.0, 2.0], y=["a", "b"], error_x={"array": [0.5, 1.0], "arrayminus": [0.25, 2.0]}, name="n")
    )
    assert plots.points(bars).to_dict("list") == {
        "trace": ["n", "n"], "x": [1.0, 2.0], "y": ["a", "b"], "low": [0.75, 0.0], "high": [1.5, 3.0]
    }  # fmt: skip


def test_export_says_what_is_missing(scores, tmp_path, monkeypatch, unchecked):
    with pytest.raises(PlotError, match="html, csv, pdf, png, svg"):
        plots.export(heatmap(scores), tmp_path / "map", formats=("gif",))
    with pytest.raises(PlotError, match="column 'nature'"):
        plots.export(heatmap(scores), tmp_path / "map", column="nature")

    def no_browser(*arguments, **options):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", no_browser)
    with pytest.raises(PlotError, match="apt-get install chromium"):
        plots.export(heatmap(scores), tmp_path / "map")
    assert [file.name for file in tmp_path.iterdir()] == ["map.html"], "HTML needs no browser"
