"""Attention tables against the attention weights of a plain model, and generation under ablation."""

from contextlib import ExitStack

import pytest
import torch
from oracles import columns_replaced
from rouge_score.rouge_scorer import RougeScorer

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import HeadError
from dps_lens.evaluation.metrics import metrics_of, score_text
from dps_lens.heads import HeadSet

HEADS = HeadSet.parse("L0H1,L2H3,L2H0")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_attention_from_the_response_equals_the_plain_models(tinies, architecture, probe):
    tiny = tinies(architecture)
    config = dps.PromptConfig(items=3, profile_tokens=200, task_tokens=30, response_tokens=8)
    users = probe[:2]
    frame = dps.profile_attention(tiny.hooked, users, HEADS, max_examples=1, prompt_config=config)
    assert frame.groupby(["example", "head"])["attention"].sum().to_numpy() == pytest.approx(1.0, abs=1e-5)
    tiny.plain.set_attn_implementation("eager")
    for user in users:
        prompt = build_prompt(tiny.hooked, user.examples[-1], config=config)
        assert len(prompt.items) == len(prompt.shown) == 3
        patterns = tiny.plain(input_ids=prompt.tokens[None], output_attentions=True).attentions
        start, stop = prompt.spans["response"]
        for head in HEADS:
            pattern = patterns[head.layer][0, head.head, start - 1 : stop - 1].mean(0)
            rows = frame[(frame["user"] == user.id) & (frame["head"] == str(head))].set_index("target")
            for number, (document, (first, last)) in enumerate(zip(prompt.shown, prompt.items, strict=True), 1):
                row = rows.loc[f"item {number}"]
                assert row["document"] == document
                assert row["tokens"] == last - first
                assert row["attention"] == pytest.approx(float(pattern[first:last].sum()), abs=1e-5)
            first, last = prompt.spans["task"]
            assert rows.loc["task"]["attention"] == pytest.approx(float(pattern[first:last].sum()), abs=1e-5)
    tiny.plain.set_attn_implementation("sdpa")


def test_spans_of_items_hold_their_documents(tinies, probe):
    model = tinies("llama").hooked
    for user in probe[:6]:
        prompt = build_prompt(model, user.examples[-1])
        titles = {document.id: document.fields["title"] for document in user.history}
        for document, (start, stop) in zip(prompt.shown, prompt.items, strict=True):
            assert prompt.spans["profile"][0] < start < stop <= prompt.spans["profile"][1]
            assert titles[document] in model.tokenizer.decode(prompt.tokens[start:stop])
    assert build_prompt(model, probe[0].examples[-1], "none").items == ()


def test_attention_refuses_heads_outside_the_model(llama, probe):
    with pytest.raises(HeadError, match="L9H0 is not in this model"):
        dps.profile_attention(llama.hooked, probe[:1], HeadSet.parse("L9H0"))


@torch.inference_mode()
def test_texts_without_heads_equal_plain_greedy_decoding(llama, probe, short, tmp_path):
    users, heads = probe[:3], HeadSet.parse("L0H1,L1H2")
    options = {"k": 2, "n_random": 2, "max_examples": 1, "max_new_tokens": 5, "prompt_config": short}
    found = dps.ablated_generation(llama.hooked, users, {"chosen": heads}, out=tmp_path / "run", **options)
    for user in users:
        prompt = build_prompt(llama.hooked, user.examples[-1], config=short)
        start = prompt.spans["response"][0]
        rows = found.texts[found.texts["user"] == user.id].set_index(["family", "draw"])["text"]
        for family, ablated in (("full model", []), ("chosen", list(heads))):
            tokens = prompt.tokens[:start]
            for _ in range(5):
                places = slice(start - 1, len(tokens))
                with ExitStack() as stack:
                    for layer, head in ablated:
                        stack.enter_context(columns_replaced(llama.plain, layer, head, 8, places, 0.0))
                    token = llama.plain(input_ids=tokens[None]).logits[0, -1].argmax()
                tokens = torch.cat([tokens, token[None]])
                if int(token) == llama.hooked.tokenizer.eos_token_id:
                    break
            text = llama.hooked.tokenizer.decode(tokens[start:], skip_special_tokens=True).strip()
            assert rows[(family, -1)] == text
    again = dps.ablated_generation(llama.hooked, users, {"chosen": heads}, out=tmp_path / "run", **options)
    assert again.texts.equals(found.texts)
    frame = found.to_frame().set_index("family")
    full = found.texts[found.texts["family"] == "full model"]["score"].mean()
    chosen = found.texts[(found.texts["family"] == "chosen") & (found.texts["draw"] == -1)]["score"].mean()
    assert frame.loc["full model", "mean"] == pytest.approx(full)
    assert frame.loc["chosen", "lost"] == pytest.approx(full - chosen)
    control = found.texts[found.texts["draw"] >= 0]["score"].mean()
    assert frame.loc["chosen", "difference"] == pytest.approx(control - chosen)


def test_a_text_is_scored_as_its_task_is(probe):
    example = probe[0].examples[-1]
    text = "What is a loaf"
    expected = RougeScorer(["rougeL"]).score(example.reference, text)["rougeL"].fmeasure
    metrics = metrics_of(example.task)
    assert score_text(metrics, example.reference, text)["ROUGE-L"] == pytest.approx(expected)
    assert score_text(metrics, example.reference, example.reference)["ROUGE-L"] == 1.0
