"""The tagging task: who is shown what, and tags' log-probabilities against a plain model."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from oracles import columns_replaced
from pcs import score_pcs
from torch.nn.functional import cross_entropy

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.evaluation.metrics import LABELS
from experiments.lib.tagging import HABITS, TAGS, Tagging, accuracies, method, tag_users

PROMPT = dps.PromptConfig(items=2, profile_tokens=60, task_tokens=40)


def test_every_film_is_held_out_once_a_habit():
    users = tag_users()
    assert len(users) == 12
    assert {user.task.name for user in users} == {"lamp-2"}
    held_out = Counter(
        (example.id.split("-")[0], example.id.split("-", 2)[2]) for user in users for example in user.examples
    )
    assert set(held_out.values()) == {1}
    assert len(held_out) == 25 * len(HABITS)
    for user in users:
        asked = {example.id.split("-", 2)[2] for example in user.examples}
        assert not asked & {document.id for document in user.history}
        assert len(asked) + len(user.history) == 25


def test_without_the_profile_one_of_three_is_right_at_most():
    answers = {}
    for user in tag_users():
        for example in user.examples:
            answers.setdefault(example.id.split("-", 2)[2], []).append(example.reference)
    assert all(len({*tags}) == 3 for tags in answers.values())
    assert Counter(tag for tags in answers.values() for tag in tags) == dict.fromkeys(LABELS["lamp-2"], 5)


@torch.no_grad()
def by_hand(plain, example, profile, model, heads=(), d_head=8):
    """Logits of the response for every tag, each prompt run whole."""
    found = []
    for tag in TAGS:
        prompt = build_prompt(model, replace(example, reference=tag), profile, config=PROMPT)
        start, stop = prompt.spans["response"]
        handles = [
            columns_replaced(plain, layer, head, d_head, slice(start - 1, None), lambda z, head=head: 0 * z[:, :, :8])
            for layer, head in heads
        ]
        for handle in handles:
            handle.__enter__()
        logits = plain(input_ids=prompt.tokens[None]).logits[0, start - 1 : stop - 1]
        for handle in reversed(handles):
            handle.__exit__(None, None, None)
        found.append((logits, prompt.response_tokens))
    return found


def total(logits, targets):
    return -float(cross_entropy(logits.double(), targets, reduction="sum"))


def test_log_probabilities_of_tags_equal_the_plain_model(llama):
    users = tag_users(8)[:2]
    scores = score_pcs(llama.hooked, users, max_examples=1, prompt_config=PROMPT)
    tagging = Tagging(llama.hooked, users, scores, (2,), (0.5,), PROMPT)
    example = users[0].examples[-1]
    found = tagging.tag(example)
    heads = scores.without({users[0].id}).top(2)
    assert tagging.sets(users[0].id, 2)["dps, K 2"] == heads
    assert not heads & tagging.sets(users[0].id, 2)["dps, K 2 (random)"]
    own, none, masked = (
        by_hand(llama.plain, example, profile, llama.hooked, chosen)
        for profile, chosen in (("own", ()), ("none", ()), ("own", heads))
    )
    for index in range(len(TAGS)):
        (full, targets), (without, _), (edited, _) = own[index], none[index], masked[index]
        expected = {
            "plain": total(without, targets),
            "rag": total(full, targets),
            method("cad", 0.5): total(full + 0.5 * (full - without), targets),
            method("dps, K 2", 0.5): total(full + 0.5 * (full - edited), targets),
        }
        for name, value in expected.items():
            assert float(found[name][index]) == pytest.approx(value, abs=1e-3)


def test_answers_are_the_tags_above_their_mean(llama, monkeypatch, tmp_path):
    """A tag that every film prefers is no answer; the tag that a film prefers more than others do is."""
    users = tag_users(8)[:3]
    examples = [example for user in users for example in user.examples]

    def tag(self, example):
        values = torch.zeros(len(TAGS), dtype=torch.float64)
        values[0] = 10.0
        right, wrong = values.clone(), values.clone()
        right[TAGS.index(example.reference)] += 1.0
        wrong[(TAGS.index(example.reference) + 1) % len(TAGS)] += 1.0
        return {"rag": wrong, "dps": right}

    monkeypatch.setattr(Tagging, "tag", tag)
    scores = dps.HeadScores(torch.zeros(1, 3, 4), example_ids=["x"], user_ids=["x"])
    done = Tagging(llama.hooked, users, scores, (2,), (1.0,), PROMPT).run(tmp_path)
    assert len(done.rows) == 2 * len(examples)
    rows = accuracies(done).set_index(["method", "metric"])
    assert rows.loc[("dps", "accuracy"), "mean"] == 1.0
    assert rows.loc[("rag", "accuracy"), "mean"] == 0.0
    assert rows.loc[("dps", "accuracy"), "to rag"] == 1.0
    assert len(list((tmp_path / "units").iterdir())) == len(examples)
