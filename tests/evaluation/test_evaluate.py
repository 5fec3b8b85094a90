"""The benchmark table: the same answers as by hand, choices that see discovery examples only, and runs that resume."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
import toy
from pcs import score_pcs

import dps_lens as dps
from dps_lens.data import Document, Example, Note, User
from dps_lens.data.tasks import TASKS
from dps_lens.errors import EvaluationError, ScoreError
from dps_lens.evaluation import Evaluation, bench, evaluate
from dps_lens.evaluation.answers import measured
from dps_lens.evaluation.artifacts import Artifacts
from dps_lens.evaluation.cost import measure_costs
from dps_lens.evaluation.methods import Writer, find_method
from dps_lens.evaluation.metrics import rouge
from dps_lens.heads import Head, HeadSet
from dps_lens.scores import HeadScores
from dps_lens.validation import HeldOutConfig
from dps_lens.vectors.steerx import NothingDrivenError
from dps_lens.vectors.style import SteeringVector, style_differences

HEADS = HeadSet.parse("L1H2,L0H1,L2H0")
PROMPT = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=20, response_tokens=6)
METHODS = {
    "plain": "plain",
    "rag": "rag",
    "cad": "cad",
    "dola": "dola",
    "dps": ("dps", HEADS),
    "dps-entropy": ("dps-entropy", HEADS),
    "amplify": ("amplify", HEADS),
    "dps+cad": ("dps+cad", HEADS),
    "stylevector": "stylevector",
    "rag+stylevector": "rag+stylevector",
    "rag+steerx": "rag+steerx",
    "head_vector": ("head_vector", HEADS),
    "rag+head_vector": ("rag+head_vector", HEADS),
    "rag+head_vector+dps": ("rag+head_vector+dps", HEADS),
    "stylevector+dps": ("stylevector+dps", HEADS),
    "rag+stylevector+cad": "rag+stylevector+cad",
    "prompt": "prompt",
}
FIXED = dps.EvaluateConfig(layers=(1,), choose_on=0, vector_examples=2)
ONE = {"strengths": (0.5,), "ks": (2,), "evaluate_config": FIXED}
OPTIONS = {"prompt_config": PROMPT, "max_new_tokens": 6, "max_examples": 1}


@pytest.fixture(scope="module")
def evaluated(tinies, probe):
    return dps.evaluate(tinies("llama").hooked, probe[:3], METHODS, **ONE, **OPTIONS)


def by_hand(model, users, user, name):
    """One call of `generate`, one prompt."""
    example = user.examples[-1]
    own, none = (dps.build_prompt(model, example, which, config=PROMPT) for which in ("own", "none"))
    differences = style_differences(model, user.discovery_examples()[-2:], prompt_config=PROMPT)
    vector = SteeringVector(differences[:, 1].mean(0), 1)
    steerx = (
        {"vectors": dps.steerx_vector(model, user, layer=1, max_examples=2, prompt_config=PROMPT)}
        if "x" in name
        else {}
    )
    heads = HEADS[:2]
    shift = {}
    if "head_vector" in name:
        vectors = dps.head_vectors(model, users, heads, max_examples=2, prompt_config=PROMPT)
        shift = {"rule": "head_vector", "vectors": vectors[user.id], "gamma": 0.5}
    how = {
        "plain": (none, {"rule": "greedy"}),
        "rag": (own, {"rule": "greedy"}),
        "cad": (own, {"rule": "cad", "negative_prompts": none, "alpha": 0.5}),
        "dola": (own, {"rule": "dola"}),
        "dps": (own, {"heads": heads, "gamma": 0.5}),
        "dps-entropy": (own, {"rule": "dps-entropy", "heads": heads}),
        "amplify": (own, {"rule": "amplify", "heads": heads, "gamma": 0.5}),
        "dps+cad": (own, {"rule": "dps+cad", "heads": heads, "gamma": 0.5, "negative_prompts": none, "alpha": 0.5}),
        "stylevector": (none, {"rule": "vector", "vectors": vector, "gamma": 0.5}),
        "rag+stylevector": (own, {"rule": "vector", "vectors": vector, "gamma": 0.5}),
        "rag+steerx": (own, {"rule": "vector", "gamma": 0.5, **steerx}),
        "head_vector": (none, shift),
        "rag+head_vector": (own, shift),
        "rag+head_vector+dps": (own, {**shift, "rule": "head_vector+dps", "heads": heads, "alpha": 0.5}),
        "stylevector+dps": (
            none,
            {"rule": "vector+dps", "vectors": vector, "gamma": 0.5, "heads": heads, "alpha": 0.5},
        ),
        "rag+stylevector+cad": (
            own,
            {"rule": "vector+cad", "vectors": vector, "gamma": 0.5, "negative_prompts": none, "alpha": 0.5},
        ),
    }
    prompt, options = how[name]
    return dps.generate(model, prompt, max_new_tokens=6, **options).texts[0].strip()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "prompt"])
def test_answers_are_those_of_generate(evaluated, llama, probe, name):
    rows = evaluated.rows[evaluated.rows["method"] == name].set_index("user")
    for user in probe[:3]:
        text = by_hand(llama.hooked, probe[:3], user, name)
        assert rows.loc[user.id, "text"] == text
        found = rouge(user.examples[-1].reference, text)
        assert rows.loc[user.id, "ROUGE-L"] == found["ROUGE-L"]
        assert rows.loc[user.id, "ROUGE-1"] == found["ROUGE-1"]


def test_prompt_shows_a_description_instead_of_the_profile(evaluated, llama, probe):
    """The model describes its user from the newest documents; the answer follows from a note that says so."""
    model, user = llama.hooked, probe[0]
    documents = user.discovery_pool
    asked = "Describe in two sentences what this user writes about and in which style."
    question = Example("q", user.id, user.task, asked, "", documents)
    config = dps.PromptConfig(**{**PROMPT.to_dict(), "retrieval": "recency", "task_tokens": None})
    prompt = dps.build_prompt(model, question, config=config, response=False)
    assert prompt.shown[0] == documents[-1].id, "the newest"
    described = dps.generate(model, prompt, heads=HEADS, gamma=0.0, max_new_tokens=64).texts[0].strip()
    note = Note(f"About the user who asks: {described}\nAnswer as this user would write.")
    shown = dps.build_prompt(model, user.examples[-1], note, config=PROMPT)
    expected = dps.generate(model, shown, heads=HEADS, gamma=0.0, max_new_tokens=6).texts[0].strip()
    rows = evaluated.rows[evaluated.rows["user"] == user.id].set_index("method")
    assert rows.loc["prompt", "text"] == expected


def test_methods_differ(evaluated):
    texts = evaluated.rows.groupby("method", sort=False)["text"].agg(tuple)
    assert len({*texts}) > len(METHODS) // 2


@torch.no_grad()
def test_fluency_is_the_plain_models_nll_without_a_profile(evaluated, llama, probe):
    user = probe[0]
    prompt = dps.build_prompt(llama.hooked, user.examples[-1], "none", config=PROMPT)
    rows = evaluated.rows[evaluated.rows["user"] == user.id].set_index("method")

    def nll(tokens):
        logits = llama.plain(input_ids=torch.cat([prompt.prompt_tokens, tokens])[None]).logits[0]
        start = len(prompt.prompt_tokens)
        return float(torch.nn.functional.cross_entropy(logits[start - 1 : -1], tokens))

    out = dps.generate(llama.hooked, prompt, heads=HEADS, gamma=0.0, max_new_tokens=6)
    words = out.tokens[0][~torch.isin(out.tokens[0], torch.tensor(llama.hooked.tokenizer.all_special_ids))]
    assert rows.loc["plain", "NLL"] == pytest.approx(nll(words), abs=1e-4)
    assert rows.loc["plain", "tokens"] == len(words)
    assert rows.loc["reference", "NLL"] == pytest.approx(nll(prompt.response_tokens), abs=1e-4)
    assert rows.loc["reference", "tokens"] == 6, "no longer than an answer may be"


def test_copied_tokens_end_a_pair_of_the_profile(evaluated, llama, probe):
    """By searching the profile's text of tokens for every pair of an answer's tokens."""
    rows = evaluated.rows.set_index(["user", "method"])
    for user in probe[:3]:
        prompt = dps.build_prompt(llama.hooked, user.examples[-1], config=PROMPT)
        parts = [" ".join(map(str, prompt.tokens[start:stop].tolist())) for start, stop in prompt.items]
        profile = " | ".join(parts)
        for method in ("reference", "rag"):
            ids = prompt.response_tokens if method == "reference" else None
            if ids is None:
                out = dps.generate(llama.hooked, prompt, rule="greedy", max_new_tokens=6).tokens[0]
                ids = out[~torch.isin(out, torch.tensor(llama.hooked.tokenizer.all_special_ids))]
            pairs = [f" {a} {b} " in f" {profile} " for a, b in pairwise(ids.tolist())]
            assert rows.loc[(user.id, method), "copied"] == pytest.approx(sum(pairs) / max(len(ids), 1))
    ids = dps.build_prompt(llama.hooked, probe[0].examples[-1], config=PROMPT).response_tokens
    first = [int(ids[0]), int(ids[1]), int(ids[2])]
    (row,) = measured(llama.hooked, probe[0].examples[-1], {"x": ids}, [0.0], None, (), profile=first)
    assert row["copied"] == pytest.approx(2 / len(ids))


def test_the_table_and_its_differences(evaluated):
    table = evaluated.to_frame().set_index(["method", "metric"])
    by_user = evaluated.rows.pivot_table(index="user", columns="method", values="ROUGE-L", sort=False)
    assert table.loc[("dps", "ROUGE-L"), "mean"] == pytest.approx(by_user["dps"].mean())
    assert ("reference", "ROUGE-L") not in table.index
    assert ("reference", "style") in table.index
    differences = evaluated.differences("plain").set_index(["method", "metric"])
    change = (by_user["rag"] - by_user["plain"]).to_numpy()
    found = differences.loc[("rag", "ROUGE-L")]
    assert found["mean"] == pytest.approx(change.mean())
    # t with 2 degrees of freedom, paired.
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * change.std(ddof=1) / math.sqrt(3), rel=1e-4)
    with pytest.raises(EvaluationError, match="'nothing' is not among plain, rag"):
        evaluated.differences("nothing")


def test_the_table_as_a_picture(evaluated):
    figure = evaluated.plot(baseline="plain")
    differences = evaluated.differences("plain").set_index(["method", "metric"])
    first, second = figure.data
    assert list(first.y) == list(second.y) == [name for name in METHODS if name != "plain"]
    for trace, metric in ((first, "ROUGE-L"), (second, "style")):
        for method, x, bar in zip(trace.y, trace.x, trace.error_x.array, strict=True):
            row = differences.loc[(method, metric)]
            assert (x, x + bar) == pytest.approx((row["mean"], row["high"]))
    assert figure.layout.xaxis2.title.text == "style, difference to plain"
    (only,) = evaluated.plot(metrics=["NLL"], baseline="plain").data
    assert only.x[0] == pytest.approx(differences.loc[("rag", "NLL"), "mean"])


def test_a_table_is_saved_whole(evaluated, tmp_path):
    evaluated.save(tmp_path)
    again = Evaluation.load(tmp_path)
    pd.testing.assert_frame_equal(again.rows, evaluated.rows)
    pd.testing.assert_frame_equal(again.to_frame(), evaluated.to_frame())
    pd.testing.assert_frame_equal(again.choices, evaluated.choices)
    pd.testing.assert_frame_equal(again.costs, evaluated.costs)
    made = again.manifest.pop("made")
    assert {**again.manifest, "made": made} == {**evaluated.manifest, "made": made}
    Evaluation.remove(tmp_path)
    with pytest.raises(EvaluationError, match="holds no Evaluation"):
        Evaluation.load(tmp_path)


def test_settings_are_chosen_on_discovery_examples(llama, probe):
    """By hand: every setting answers each user's newest discovery example; the first best mean wins."""
    model, users = llama.hooked, list(probe[:3])
    methods = {"rag": "rag", "dps": ("dps", HEADS), "stylevector": "stylevector"}
    grid, layers = {"strengths": (0.5, 2.0), "ks": (1, 3)}, (0, 2)
    config = dps.EvaluateConfig(layers=layers, choose_on=1, vector_examples=2)
    found = dps.evaluate(model, users, methods, evaluate_config=config, **grid, **OPTIONS)
    scores = {}
    for user in users:
        *earlier, example = user.discovery_examples()
        own, none = (dps.build_prompt(model, example, which, config=PROMPT) for which in ("own", "none"))
        differences = style_differences(model, earlier[-2:], prompt_config=PROMPT)
        for strength in grid["strengths"]:
            for k in grid["ks"]:
                out = dps.generate(model, own, heads=HEADS[:k], gamma=strength, max_new_tokens=6)
                scores.setdefault(("dps", f"strength {strength:g}, K {k}"), []).append(out.texts[0])
            for layer in layers:
                vector = SteeringVector(differences[:, layer].mean(0), layer)
                out = dps.generate(model, none, rule="vector", vectors=vector, gamma=strength, max_new_tokens=6)
                scores.setdefault(("stylevector", f"strength {strength:g}, layer {layer}"), []).append(out.texts[0])
    references = [user.discovery_examples()[-1].reference for user in users]
    choices = found.choices.set_index(["method", "setting"])
    means = {}
    for key, texts in scores.items():
        values = [rouge(reference, text.strip())["ROUGE-L"] for reference, text in zip(references, texts, strict=True)]
        means[key] = np.mean(values)
        assert choices.loc[key, "ROUGE-L"] == pytest.approx(means[key])
    for name in ("dps", "stylevector"):
        own = {key: value for key, value in means.items() if key[0] == name}
        best = max(own, key=own.get)
        assert choices.loc[best, "chosen"]
        assert choices.loc[name]["chosen"].sum() == 1
    assert choices.loc[("rag", "none"), "chosen"]


def test_a_run_resumes(llama, probe, tmp_path, monkeypatch):
    methods = {"rag": "rag", "stylevector": "stylevector"}
    config = dps.EvaluateConfig(layers=(1,), vector_examples=1)
    options = {"strengths": (0.5, 1.0), "evaluate_config": config, **OPTIONS}
    whole = dps.evaluate(llama.hooked, probe[:2], methods, **options)
    calls, timed, stops, real, measure = [], [], [True], bench.write, bench.measure_costs

    def counted(*arguments, **options):
        if len(calls) == 3 and stops:
            raise KeyboardInterrupt
        calls.append(len(arguments[2]))
        return real(*arguments, **options)

    monkeypatch.setattr(bench, "write", counted)
    monkeypatch.setattr(bench, "measure_costs", lambda *of: timed.append(1) or measure(*of))
    with pytest.raises(KeyboardInterrupt):
        dps.evaluate(llama.hooked, probe[:2], methods, out=tmp_path, **options)
    assert calls == [2, 2, 2], "the grid for two users, the answers of the first"
    stops.clear()
    resumed = dps.evaluate(llama.hooked, probe[:2], methods, out=tmp_path, **options)
    assert calls[3:] == [2], "the answers of the second"
    assert timed == [1]
    pd.testing.assert_frame_equal(resumed.rows, whole.rows)
    for name in ("write", "measure_costs"):
        monkeypatch.setattr(bench, name, lambda *_, **__: pytest.fail("everything is there"))
    again = dps.evaluate(llama.hooked, probe[:2], methods, out=tmp_path, **options)
    pd.testing.assert_frame_equal(again.costs, resumed.costs)
    pd.testing.assert_frame_equal(Evaluation.load(tmp_path).rows, whole.rows)
    with pytest.raises(dps.DPSLensError, match="made with other settings: methods"):
        dps.evaluate(llama.hooked, probe[:2], {"rag": "rag"}, out=tmp_path, **options)
    turned = dict(reversed(methods.items()))
    with pytest.raises(dps.DPSLensError, match="made with other settings: order was"):
        dps.evaluate(llama.hooked, probe[:2], turned, out=tmp_path, **options)


def test_a_profile_helps_where_it_is_known_to(toy_model, toy_users):
    """The toy model writes the user's signature if it sees the profile, or if the carrier is not left out."""
    carrier = HeadSet([Head(*toy.CARRIER)])
    methods = {"plain": "plain", "rag": "rag", "masked": ("dps", carrier)}
    found = dps.evaluate(
        toy_model,
        toy_users,
        methods,
        strengths=(-1.0,),
        ks=(1,),
        max_new_tokens=1,
        evaluate_config=dps.EvaluateConfig(choose_on=0),
    )
    pairs = zip(found.rows["text"], found.rows["reference"], strict=True)
    first = found.rows.assign(first=[text.split()[:1] == reference.split()[:1] for text, reference in pairs])
    right = first.groupby("method")["first"].mean()
    assert right["rag"] == 1.0
    assert right["plain"] < 0.5
    assert right["masked"] < 0.5
    rag = found.differences("plain").set_index(["method", "metric"]).loc[("rag", "ROUGE-1")]
    assert rag["low"] > 0


def test_flops_are_those_of_the_passes(llama, probe):
    """By hand: two a multiply-add, for the passes that each rule needs."""
    cfg, prompts = llama.hooked.cfg, {}
    for name, profile in (("own", "own"), ("none", "none")):
        prompts[name] = dps.build_prompt(llama.hooked, probe[0].examples[-1], profile, config=PROMPT)
    n_own = len(prompts["own"].prompt_tokens)

    def passed(new, before, logits):
        """One pass over `new` tokens after `before` cached ones."""
        kv = cfg.n_key_value_heads or cfg.n_heads
        products = cfg.d_model * cfg.d_head * (2 * cfg.n_heads + 2 * kv) + 3 * cfg.d_model * cfg.d_mlp
        attention = 4 * new * (before + new) * cfg.n_heads * cfg.d_head
        return cfg.n_layers * (2 * new * products + attention) + 2 * logits * cfg.d_model * cfg.d_vocab

    def answer(prompt, rows):
        return passed(prompt - 1, 0, 1) + rows * sum(passed(1, prompt - 1 + step, 1) for step in range(4))

    expected = {"rag": answer(n_own, 1), "dps": answer(n_own, 2), "cad": 2 * answer(n_own, 1)}
    methods = {"rag": "rag", "dps": ("dps", HEADS), "cad": "cad"}
    writers = [
        Writer(found, found.settings[0], HEADS)
        for found in (find_method(name, one, (0.5,), (3,), ()) for name, one in methods.items())
    ]
    counted = measure_costs(llama.hooked, prompts, writers, 4)["FLOPs a token"] * 4
    for (name, wanted), value in zip(expected.items(), counted.tolist(), strict=True):
        # Rows of unequal prompts are padded; the positions of rotary embeddings are a small product of their own.
        assert value == pytest.approx(wanted, rel=0.02), name


def test_costs_name_every_method(evaluated):
    costs = evaluated.costs.set_index("method")
    assert [*costs.index] == [*METHODS]
    assert bool((costs > 0).all().all())
    assert costs.loc["dps", "FLOPs a token"] > costs.loc["rag", "FLOPs a token"]


def test_bad_input_says_what_to_do(llama, probe):
    model, users = llama.hooked, list(probe[:2])

    def run(methods, **options):
        return evaluate(model, users, methods, **{**ONE, **OPTIONS, **options})

    with pytest.raises(EvaluationError, match=r"'x' needs heads, such as \('dps', scores\)"):
        run({"x": "dps"})
    with pytest.raises(EvaluationError, match="'x' takes no heads"):
        run({"x": ("cad", HEADS)})
    with pytest.raises(EvaluationError, match="ask for stylevector, steerx"):
        run({"x": "vector"})
    with pytest.raises(EvaluationError, match="ask for 'rag\\+stylevector\\+cad'"):
        run({"x": "stylevector+cad"})
    with pytest.raises(dps.DPSLensError, match="'nonsense' is unknown"):
        run({"x": "nonsense"})
    with pytest.raises(EvaluationError, match=r"nothing to choose them on \(choose_on=0, .*or raise choose_on"):
        run({"x": "cad"}, strengths=(0.5, 1.0))
    with pytest.raises(EvaluationError, match="'x' has no setting"):
        run({"x": "cad"}, strengths=())
    with pytest.raises(EvaluationError, match="layer 99 is not in this model of 3 layers"):
        run({"x": "stylevector"}, evaluate_config=replace(FIXED, layers=(99,)))
    with pytest.raises(EvaluationError, match="'reference' is what the user wrote"):
        run({"reference": "rag"})
    for zero in ({"max_examples": 0}, {"max_new_tokens": 0}, {"evaluate_config": replace(FIXED, vector_examples=0)}):
        with pytest.raises(EvaluationError, match="are at least 1"):
            run({"x": "rag"}, **zero)
    with pytest.raises(EvaluationError, match="at least one user and one method"):
        run({})
    bare = User("bare", users[0].task, users[0].history[:2], users[0].examples)
    with pytest.raises(EvaluationError, match="user 'bare' has 0 discovery examples, 1 are needed"):
        evaluate(model, [bare], {"x": "stylevector"}, **ONE, **OPTIONS)
    scores = score_pcs(
        model, users, max_examples=1, prompt_config=PROMPT, score_config=dps.ScoreConfig(discovery="labelled")
    )
    with pytest.raises(ScoreError, match="evaluate"):
        run({"dps": ("dps", scores)})


def test_empty_answers_leave_the_pair_out():
    """User b's first answer of `x` is empty: it has no NLL, and its partner does not count either."""
    rows = [("a", "1", "rag", 1.0), ("b", "1", "rag", 9.0), ("b", "2", "rag", 3.0)]
    rows += [("a", "1", "x", 2.0), ("b", "1", "x", math.nan), ("b", "2", "x", 5.0)]
    frame = pd.DataFrame(rows, columns=["user", "example", "method", "NLL"])
    found = Evaluation(frame, pd.DataFrame(), pd.DataFrame(), TASKS["lamp-4"])
    (row,) = found.differences("rag").to_dict("records")
    assert (row["metric"], row["mean"]) == ("NLL", pytest.approx((1 + 2) / 2))
    assert row["high"] - row["mean"] == pytest.approx(12.7062 * 0.5, rel=1e-4), "two users"
    nobody = Evaluation(frame.assign(NLL=math.nan), pd.DataFrame(), pd.DataFrame(), TASKS["lamp-4"])
    assert nobody.differences("rag")["mean"].isna().all()


def test_families_that_the_model_does_not_show_are_left_out(llama, probe):
    shape = (1, llama.hooked.cfg.n_layers, llama.hooked.cfg.n_heads)
    manifest = {"reason": "recalled 2 of 40 needles"}
    undefined = HeadScores(torch.full(shape, torch.nan), example_ids=["0"], user_ids=[""], manifest=manifest)
    with pytest.warns(UserWarning, match="method 'decore' is left out: recalled 2 of 40 needles"):
        found = dps.evaluate(llama.hooked, probe[:2], {"rag": "rag", "decore": ("decore", undefined)}, **ONE, **OPTIONS)
    assert found.methods == ("rag", "reference")
    assert found.manifest["undefined"] == {"decore": "recalled 2 of 40 needles"}


def test_what_is_left_out_while_choosing_is_in_no_profile(llama, probe):
    """Undated histories: an older example's profile holds newer documents, but not those that choose."""
    user = probe[0]
    undated = User(user.id, user.task, tuple(Document(d.id, d.fields) for d in user.history), user.examples)
    assert any(undated.discovery_examples()[-1].id in {d.id for d in e.profile} for e in undated.discovery_examples())
    portraits = Artifacts(llama.hooked, [undated], PROMPT, newest=3)
    newest = undated.discovery_examples()[-1].id
    kept = portraits._examples(undated.id, 1)
    assert len(kept) == 3
    assert all(newest not in {example.id, *(d.id for d in example.profile)} for example in kept)
    assert [example.id for example in portraits._examples(undated.id, 0)][-1] == newest


def test_users_without_preference_driven_tokens_are_not_steered(llama, probe, monkeypatch):
    from dps_lens.evaluation import artifacts

    def nothing(*_, **__):
        raise NothingDrivenError("none")

    monkeypatch.setattr(artifacts, "steerx_vectors", nothing)
    found = Artifacts(llama.hooked, probe[:1], PROMPT).vector("steerx", probe[0].id, 1)
    assert not found.values.any()


def test_closed_tasks_have_no_style_and_their_own_metrics(llama):
    documents = tuple(Document(str(index), {"text": f"Text {index}.", "score": "4"}) for index in range(5))
    asked = "What is the score of the following review on a scale of 1 to 5? review: It was fine."
    task = TASKS["lamp-3"]

    def user(name, answer):
        return User(name, task, documents, (Example(f"{name}1", name, task, asked, answer, documents),))

    found = dps.evaluate(llama.hooked, [user("a", "4"), user("b", "2")], {"rag": "rag"}, **ONE, **OPTIONS)
    assert found.metrics == ("MAE", "RMSE", "NLL", "repeated", "copied", "tokens")
    table = found.to_frame().set_index(["method", "metric"])
    # A random model writes no number: 3 away from 4 and from 2.
    assert table.loc[("rag", "MAE"), "mean"] == table.loc[("rag", "RMSE"), "mean"] == 3.0
    with pytest.raises(EvaluationError, match="example 'a1': its answer 'good' is no number"):
        dps.evaluate(llama.hooked, [user("a", "good")], {"rag": "rag"}, **ONE, **OPTIONS)


RANKED = {
    "plain": "plain",
    "rag": "rag",
    "cad": "cad",
    "dola": "dola",
    "dps": ("dps", HEADS),
    "dps-patch": ("dps-patch", HEADS),
    "dps-entropy": ("dps-entropy", HEADS),
    "amplify": ("amplify", HEADS),
    "rag+head_vector": ("rag+head_vector", HEADS),
    "rag+head_vector+dps": ("rag+head_vector+dps", HEADS),
}


@pytest.fixture(scope="module")
def pairs(probe):
    return dps.make_pairs(probe[:3], n_rejected=2)


@pytest.fixture(scope="module")
def ranked(tinies, pairs):
    return dps.evaluate(tinies("llama").hooked, pairs, RANKED, **ONE, **OPTIONS)


def test_answers_are_compared_as_rank_answers_does(ranked, llama, pairs):
    found = dps.rank_answers(llama.hooked, pairs, prompt_config=PROMPT, max_examples=1)
    for method, condition in (("rag", "own"), ("plain", "no_profile")):
        rows = ranked.rows[ranked.rows["method"] == method].set_index("user")
        for name in ("accuracy", "chance", "margin", "probability", "overconfidence"):
            measured_ = rows["preference accuracy" if name == "accuracy" else name]
            expected = found.by_user(name).set_index("user")[condition]
            torch.testing.assert_close(measured_.to_numpy(), expected[measured_.index].to_numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in RANKED if name not in ("plain", "rag")])
def test_margins_are_those_of_the_sweep(ranked, llama, pairs, name):
    method = RANKED[name]
    if "vector" in name:
        vectors = dps.head_vectors(llama.hooked, pairs, HEADS[:2], max_examples=2, prompt_config=PROMPT)
        method = ("head_vector+dps", (vectors, HEADS)) if "dps" in name else ("head_vector", vectors)
    # DoLa has no strength to choose, it is 1; what every step finds has no cap.
    strength = 1.0 if name == "dola" else math.inf if name == "dps-entropy" else 0.5
    options = {"k": 2, "n_random": 0, "max_examples": 1, "prompt_config": PROMPT}
    config = HeldOutConfig(objective="pair")
    sweep = dps.steering_sweep(
        llama.hooked, pairs, {name: method}, strengths=(strength,), held_out_config=config, **options
    )
    margins = ranked.rows[ranked.rows["method"] == name].set_index("user")["margin"]
    expected = -(sweep.nll + sweep.change[name][0])
    torch.testing.assert_close(torch.tensor(margins[list(sweep.user_ids)].to_numpy()), expected, atol=1e-5, rtol=0)


def test_pairs_choose_settings_by_their_margin(llama, pairs):
    config = dps.EvaluateConfig(choose_on=1)
    methods = {"rag": "rag", "cad": "cad"}
    table = dps.evaluate(
        llama.hooked, pairs, methods, strengths=(0.5, 2.0), evaluate_config=config, **OPTIONS, metrics=["margin"]
    )
    grid = table.choices[table.choices["method"] == "cad"]
    # The newest discovery example of each user, under each strength, is an evaluation example here.
    chosen_on = [replace(user, examples=user.discovery_examples()[-1:]) for user in pairs]
    sweep = dps.steering_sweep(
        llama.hooked, chosen_on, {"cad": "cad"}, strengths=(0.5, 2.0), n_random=0, prompt_config=PROMPT,
        held_out_config=HeldOutConfig(objective="pair"),
    )  # fmt: skip
    margins = -(sweep.nll + sweep.change["cad"]).mean(1)
    torch.testing.assert_close(torch.tensor(grid["margin"].to_numpy()), margins, atol=1e-5, rtol=0)
    assert grid["chosen"].to_list() == (margins == margins.max()).tolist()
    assert set(table.to_frame()["metric"]) >= {"margin", "author"}
    assert "ROUGE-L" not in table.rows


def test_answers_that_are_not_there_cannot_be_compared(llama, probe):
    with pytest.raises(
        EvaluationError, match=r"'margin' compares answers, and example .* has one answer only; .*make_pair"
    ):
        dps.evaluate(llama.hooked, probe[:2], {"rag": "rag"}, metrics=["ROUGE-L", "margin"], **ONE, **OPTIONS)


def test_answers_that_are_alike_are_left_unranked(llama, pairs):
    """Where nobody asked for ranks, users that could be evaluated without them still are."""
    example = pairs[0].examples[-1]
    alike = replace(example, rejected=(example.reference + " and then some more of it",))
    users = [replace(pairs[0], examples=(alike,)), *pairs[1:]]
    with pytest.warns(UserWarning, match="answers are not ranked: answers of example .* alike for response_tokens"):
        table = dps.evaluate(llama.hooked, users, {"rag": "rag"}, **ONE, **OPTIONS)
    assert "margin" not in table.rows
    assert "ROUGE-L" in table.rows
    with pytest.raises(EvaluationError, match="'margin' compares answers, and answers of example"):
        dps.evaluate(llama.hooked, users, {"rag": "rag"}, metrics=["margin"], **ONE, **OPTIONS)
