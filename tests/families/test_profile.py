"""Profile-retrieval heads against a literal computation of the published score on a plain model."""

import statistics

import pytest
import torch

import dps_lens as dps
from dps_lens.errors import ScoreError
from dps_lens.families.profile import document_score, nulled

PROMPT = dps.PromptConfig(profile_tokens=200, task_tokens=16, response_tokens=6)


def attention_of(plain, prompt):
    start, stop = prompt.spans["response"]
    with torch.no_grad():
        patterns = plain(input_ids=prompt.tokens[None], output_attentions=True).attentions
    return [pattern[0, :, start - 1 : stop - 1, :start] for pattern in patterns]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_scores_are_the_published_ones(tinies, probe, architecture):
    tiny, users = tinies(architecture), probe[:3]
    family = dps.ProfileRetrieval(users, items=2, prompt_config=PROMPT)
    scores = dps.reference_heads(tiny.hooked, [family], cache=False)["profile_retrieval"]
    assert scores.user_ids == tuple(user.id for user in users)
    plain = type(tiny.plain).from_pretrained(tiny.folder, attn_implementation="eager", dtype=torch.float32).eval()
    for row, user in enumerate(users):
        prompt = family.prompt(tiny.hooked, user.discovery_examples()[-1])
        assert sorted(name.rpartition(" ")[0] for name in prompt.shown) == [
            "another user's documents", "another user's documents", "own documents", "own documents",
        ]  # fmt: skip
        own, null = attention_of(plain, prompt), attention_of(plain, nulled(tiny.hooked, prompt))
        for layer in range(tiny.hooked.cfg.n_layers):
            for head in range(tiny.hooked.cfg.n_heads):
                expected = {"own documents": 0.0, "another user's documents": 0.0}
                for shown, (start, stop) in zip(prompt.shown, prompt.items, strict=True):
                    tokens = [
                        float(own[layer][head, :, place].mean() - null[layer][head, :, place].mean())
                        for place in range(start, stop)
                    ]
                    least = statistics.mean(tokens) - 2 * statistics.stdev(tokens)
                    expected[shown.rpartition(" ")[0]] += sum(token for token in tokens if token > least)
                for name, value in expected.items():
                    assert float(scores.components[name][row, layer, head]) == pytest.approx(value, abs=1e-5)
    assert torch.equal(scores.values, scores.components["own documents"])


def test_a_short_document_has_no_tokens_to_leave_out():
    assert float(document_score(torch.tensor([[[0.25]]]))) == 0.25
    far = torch.cat([torch.full((1, 1, 30), 0.1), torch.full((1, 1, 1), -5.0)], -1)
    assert float(document_score(far)) == pytest.approx(3.0)


def test_one_user_alone_is_refused(tinies, probe):
    with pytest.raises(ScoreError, match="at least two users"):
        dps.reference_heads(tinies("llama").hooked, [dps.ProfileRetrieval(probe[:1])], cache=False)


def test_documents_that_do_not_fit_are_told(tinies, probe):
    few = dps.PromptConfig(profile_tokens=40)
    with pytest.raises(ScoreError, match="fit into the profile"):
        dps.reference_heads(tinies("llama").hooked, [dps.ProfileRetrieval(probe[:2], prompt_config=few)], cache=False)
