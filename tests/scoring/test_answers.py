"""Objectives that compare answers: against plain Hugging Face, and against separate runs of each answer."""

from dataclasses import replace

import numpy as np
import oracles
import plants
import pytest
import torch
import transformers

import dps_lens as dps
from dps_lens.data.conditions import prompts_in
from dps_lens.errors import ScoreError
from dps_lens.heads import Head
from dps_lens.model import runner_of
from dps_lens.scoring import CleanRun, example_run, single_heads
from dps_lens.scoring.attribution import attribute
from dps_lens.scoring.paths import integrated

FIVE = ("llama", "gpt2", "gpt_neox", "gemma2", "qwen3")
OBJECTIVES = [dps.Pair(), dps.Pair(per_token=False), dps.Choice(), dps.Choice(per_token=False)]
QUIET = dps.RunConfig(progress=False)


def literal(objective, nlls, lengths):
    """The objective by its definition, in floats."""
    nlls = [nll if objective.per_token else nll * n for nll, n in zip(nlls, lengths, strict=True)]
    if isinstance(objective, dps.Pair):
        return nlls[0] - sum(nlls[1:]) / len(nlls[1:])
    return float(-np.log(np.exp(-nlls[0]) / np.exp(-np.array(nlls)).sum()))


@pytest.fixture(scope="module")
def pairs(probe):
    """Two users with two rejected answers each, of other lengths than the own one."""
    made = dps.make_pairs(probe[:4], n_rejected=2)
    return [replace(user, examples=user.examples[:1]) for user in made]


def swapped(users, place):
    """The same users, asked for one of their rejected answers."""
    return [
        replace(
            user,
            examples=tuple(
                replace(
                    one,
                    reference=one.rejected[place],
                    rejected=(one.reference, *one.rejected[:place], *one.rejected[place + 1 :]),
                )
                for one in user.examples
            ),
        )
        for user in users
    ]


@pytest.mark.parametrize("architecture", FIVE)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_objectives_are_the_literal_computation(objective, architecture, tinies, pairs, short):
    tiny = tinies(architecture)
    cfg, example = tiny.hooked.cfg, pairs[0].examples[0]
    prompt = dps.build_prompt(tiny.hooked, example, config=short)
    lengths = [len(one.response_tokens) for one in prompt.answers]
    run = example_run(runner_of(tiny.hooked), prompt, objective=objective)
    clean = literal(objective, [oracles.nll(tiny.plain, one) for one in prompt.answers], lengths)
    assert run.value == pytest.approx(clean, abs=1e-4)
    ablated = run.ablated(single_heads(cfg.n_layers, cfg.n_heads)).reshape(cfg.n_layers, cfg.n_heads)
    for layer, head in [(0, 0), (cfg.n_layers - 1, cfg.n_heads - 1)]:
        nlls = [
            oracles.ablated_nll(tiny.plain, one, layer, head, cfg.d_head, "response", 0.0) for one in prompt.answers
        ]
        assert float(ablated[layer, head]) == pytest.approx(literal(objective, nlls, lengths), abs=1e-4)


def test_answers_of_unequal_length_are_compared_as_asked(llama, pairs):
    example = replace(pairs[0].examples[0], reference="a", rejected=("a long answer of many more words than one",))
    prompt = dps.build_prompt(llama.hooked, example)
    short, long = (oracles.nll(llama.plain, one) for one in prompt.answers)
    n_short, n_long = (len(one.response_tokens) for one in prompt.answers)
    assert n_long > 3 * n_short
    runner = runner_of(llama.hooked)
    values = {one: example_run(runner, prompt, objective=dps.Choice(per_token=one)).value for one in (True, False)}
    assert values[True] == pytest.approx(np.log1p(np.exp(short - long)), abs=1e-4)
    assert values[False] == pytest.approx(np.log1p(np.exp(n_short * short - n_long * long)), abs=1e-4)


def test_a_prompt_is_run_once_for_all_answers(llama, pairs, short, monkeypatch):
    runner = runner_of(llama.hooked)
    prompt = dps.build_prompt(llama.hooked, pairs[0].examples[0], config=short)
    prefilled = []
    prefill = type(runner).prefill
    monkeypatch.setattr(type(runner), "prefill", lambda *a, **k: prefilled.append(1) or prefill(*a, **k))
    run = example_run(runner, prompt, objective="pair")
    assert len(prefilled) == 1
    apart = [CleanRun(runner, one) for one in prompt.answers]
    assert [one.value for one in run.runs] == pytest.approx([one.value for one in apart], abs=1e-6)


def _patched(model, users, config, objective):
    example = users[0].examples[0]
    (own,) = prompts_in(model, example, "own", users, config=config)
    (other,) = prompts_in(model, example, "other_user", users, config=config)
    runs = [example_run(runner_of(model), one, objective=objective, keep_z=True) for one in (own, other)]
    return runs[0].patched_from(runs[1], dps.Patch())


def test_paths_of_a_pair_are_the_difference_of_its_answers(llama, pairs, short):
    model = llama.hooked
    pair = integrated(_patched(model, pairs, short, dps.Pair()), 5)
    each = [integrated(one, 5) for one in _patched(model, pairs, short, dps.Pair()).runs]
    expected = each[0].values - (each[1].values + each[2].values) / 2
    torch.testing.assert_close(pair.values, expected, atol=1e-6, rtol=1e-4)
    assert pair.change == pytest.approx(each[0].change - (each[1].change + each[2].change) / 2, abs=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_paths_add_up_to_the_whole_change(objective, llama, pairs, short):
    values, change = integrated(_patched(llama.hooked, pairs, short, objective), 60)
    assert abs(change) > 1e-4
    assert float(values.sum()) == pytest.approx(change, rel=1e-3, abs=1e-5)


def test_slopes_of_a_choice_are_those_of_small_ablations(llama, pairs, short):
    """An ablation that hardly changes z has the effect that its first-order estimate says."""
    model = llama.hooked
    prompt = dps.build_prompt(model, pairs[0].examples[0], config=short)
    own = example_run(runner_of(model), prompt, objective="choice", keep_z=True)
    near = own.each(own, lambda run, _: run.with_values(dps.Patch(z=run.z * 0.999)))
    cfg = model.cfg
    measured = near.ablated(single_heads(cfg.n_layers, cfg.n_heads)).reshape(cfg.n_layers, cfg.n_heads) - near.value
    torch.testing.assert_close(attribute(near), measured.float(), atol=2e-7, rtol=0.05)


@pytest.mark.parametrize("method", ["exact", "attribution", "screened"])
def test_every_method_scores_pairs(method, llama, pairs, short):
    options = {"prompt_config": short, "method": method, "max_examples": 1, "run_config": QUIET}
    scores = dps.score_heads(
        llama.hooked, pairs[:2], ablation="zero", against="no_profile", objective="pair", **options
    )
    assert scores.manifest["objective"] == "pair"
    assert bool(torch.isfinite(scores.values).all())
    assert scores.values.abs().max() > 1e-4


def test_sets_are_measured_on_the_difference(llama, pairs, short):
    """Of ablated, patched and kept sets, the pair's numbers are those of the answers, measured apart, subtracted."""
    model, heads = llama.hooked, {"two": dps.HeadSet.parse("L0H1,L1H2")}
    # Of two users, so that one is the other's donor, whoever wrote what is rejected.
    pairs = [
        replace(user, examples=tuple(replace(e, rejected=e.rejected[:1]) for e in user.examples)) for user in pairs[:2]
    ]
    shared = {"prompt_config": short, "run_config": QUIET, "n_random": 2}

    def of(call, users, objective, **options):
        config = dps.HeldOutConfig(objective=objective)
        return call(model, users, heads, held_out_config=config, **shared, **options)

    for call, options in (
        (dps.ablation_curve, {"ks": (2,)}),
        (dps.patch_heads, {"ks": (2,), "against": "other_user"}),
    ):
        pair = of(call, pairs, "pair", **options)
        own, lost = (of(call, users, "nll", **options) for users in (pairs, swapped(pairs, 0)))
        for name in pair.chosen.keys() - {"neutral", "task"}:
            expected = own.chosen[name][..., 0] - lost.chosen[name][..., 0]
            torch.testing.assert_close(pair.chosen[name][..., 0], expected, atol=1e-5, rtol=1e-4)
            drawn = own.draws[name][..., 0] - lost.draws[name][..., 0]
            torch.testing.assert_close(pair.draws[name][..., 0], drawn, atol=1e-5, rtol=1e-4)
        if call is dps.ablation_curve:
            costs = [one.to_frame().query("measure in ('task_cost', 'neutral_cost')")["mean"] for one in (pair, own)]
            assert list(costs[0]) == pytest.approx(list(costs[1]), abs=1e-6)
            with pytest.raises(ScoreError, match="compares answers"):
                pair.to_frame(part="copied")
    kept = [of(dps.faithfulness, *asked, sizes=(0.1, 0.2)) for asked in
            ((pairs, "pair"), (pairs, "nll"), (swapped(pairs, 0), "nll"))]  # fmt: skip
    torch.testing.assert_close(kept[0].circuits, kept[1].circuits - kept[2].circuits, atol=1e-5, rtol=1e-4)


@pytest.fixture
def needed(tmp_path):
    """The planted `harmful`, whose needed head writes little and is read loudly.

    What a head writes also changes the scale of the final normalisation, and by it every margin a little.
    """
    folder = plants.build("harmful", tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    layer, head = plants.HARMFUL
    with torch.no_grad():
        rows = slice(head * plants.D_HEAD, (head + 1) * plants.D_HEAD)
        plain.transformer.h[layer].attn.c_proj.weight[rows, plants.WORD_COMES] /= 4
        plain.lm_head.weight[:, plants.WORD_COMES] *= 4
    plain.save_pretrained(folder)
    return dps.load_model(str(folder)), dps.make_pairs(plants.load("harmful", tmp_path / "users").users)


def test_what_any_text_needs_cancels(needed):
    """L0H3 says that a word comes, whosever text it is; L1H2 writes the user's signature."""
    model, users = needed
    options = {"ablation": "zero", "against": None, "method": "exact", "run_config": QUIET}
    nll, pair = (dps.score_heads(model, users, objective=one, **options).mean() for one in ("nll", "pair"))
    carrier = Head(1, 2)
    assert nll[plants.HARMFUL] > 0.5
    assert abs(pair[plants.HARMFUL]) < 0.01 * nll[plants.HARMFUL]
    assert pair.flatten().argmax() == carrier.layer * pair.shape[1] + carrier.head
    for objective in ("nll", "pair"):
        assert dps.score_heads(model, users, objective=objective, run_config=QUIET).top(1).heads == (carrier,)


@pytest.mark.parametrize(
    "method", ["rank", *(pytest.param(one, marks=pytest.mark.full) for one in ("greedy", "gates", "conditional"))]
)
def test_finders_find_the_carrier_by_pairs(method, planted):
    case = planted("harmful")
    users = dps.make_pairs(case.users)
    config = dps.FindConfig(objective="pair", n_bootstraps=2)
    found = dps.find_heads(
        case.model, users, 1, method=method, max_task_cost=None, max_neutral_cost=None, find_config=config,
        run_config=QUIET,
    )  # fmt: skip
    assert {*found.heads} == case.carriers
    assert found.manifest["objective"] == "pair"


@pytest.mark.full
def test_costs_of_a_set_are_of_the_model_not_of_the_pair(planted):
    case = planted("harmful")
    config = dps.FindConfig(n_bootstraps=0)
    options = {"method": "rank", "max_task_cost": None, "max_neutral_cost": None, "run_config": QUIET}
    costs = [
        dps.find_heads(case.model, users, 1, find_config=replace(config, objective=objective), **options).effects
        for users, objective in ((case.users, None), (dps.make_pairs(case.users), "pair"))
    ]
    for name in ("task_cost", "neutral_cost"):
        torch.testing.assert_close(costs[0][name], costs[1][name])


def test_an_example_without_a_rejected_answer_is_refused(llama, probe, short):
    with pytest.raises(ScoreError, match="make_pairs"):
        dps.score_heads(llama.hooked, probe[:2], objective="pair", prompt_config=short, run_config=QUIET)
    with pytest.raises(ScoreError, match="use one of nll, pair, choice"):
        dps.score_heads(llama.hooked, probe[:2], objective="margin", run_config=QUIET)


def test_sets_take_the_objective_of_their_scores(llama, pairs, short):
    scores = dps.score_heads(
        llama.hooked, pairs, objective=dps.Pair(per_token=False), prompt_config=short, max_examples=1, run_config=QUIET
    )
    curve = dps.ablation_curve(llama.hooked, pairs, {"pair": scores}, ks=(1,), n_random=0, run_config=QUIET)
    assert curve.manifest["objective"] == {"name": "pair", "per_token": False}
    assert curve.loss == "pair"
    assert not dps.held_out_effects(llama.hooked, pairs, scores, k=2, run_config=QUIET).empty
