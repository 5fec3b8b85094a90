"""What the server writes is what the library writes, through OpenAI's own client."""

import json

import openai
import pytest
import torch
from served import DOCUMENTS, SETS, ask, generated, vector_of

import dps_lens as dps
from dps_lens.data import Document
from dps_lens.data.prompts import conversation_prompt
from dps_lens.data.tokenizer import end_tokens
from dps_lens.heads import HeadSet

QUESTION = "How do I bake bread?"
CONVERSATION = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "How do I bake bread?"},
    {"role": "assistant", "content": "Slowly."},
    {"role": "user", "content": "And rolls?"},
]


def shown(model, messages=({"role": "user", "content": QUESTION},), documents=DOCUMENTS):
    history = [Document(str(at), {"text": text}) for at, text in enumerate(documents)]
    return conversation_prompt(model, messages, history)


def cases(model):
    """`dps` of a request, and the call of `generate` that it stands for."""
    bare, own = shown(model, documents=()), shown(model)
    return {
        "off": (None, bare, {"rule": "greedy"}),
        "named heads": ({"heads": "L1H2"}, bare, {"heads": "L1H2"}),
        "strength 0": ({"heads": "L1H2", "gamma": 0}, bare, {"rule": "greedy"}),
        "profile": ({"user": "ann"}, own, {"heads": SETS["ann"], "gamma": 1.5}),
        "profile, other strength": ({"user": "ann", "gamma": 0.5}, own, {"heads": SETS["ann"], "gamma": 0.5}),
        "profile, no documents": ({"user": "ann", "documents": []}, bare, {"heads": SETS["ann"], "gamma": 1.5}),
        "profile, not steered": ({"user": "ann", "rule": "greedy"}, own, {"rule": "greedy"}),
        "cap": ({"user": "bob"}, bare, {"heads": SETS["bob"], "decode_config": dps.DecodeConfig(max_kl=0.2)}),
        "vector": ({"user": "eve"}, bare, {"rule": "head_vector", "vectors": vector_of(model)}),
        "another's vector": (
            {"user": "ann", "vector": "eve", "rule": "head_vector+dps", "alpha": 0.7},
            own,
            {"rule": "head_vector+dps", "heads": SETS["ann"], "vectors": vector_of(model), "gamma": 1.5, "alpha": 0.7},
        ),
        "documents against none": (
            {"documents": DOCUMENTS, "rule": "cad", "alpha": 0.9},
            own,
            {"rule": "cad", "alpha": 0.9, "negative_prompts": bare},
        ),
        "patched": (
            {"user": "ann", "rule": "dps-patch"},
            own,
            {"rule": "dps-patch", "heads": SETS["ann"], "gamma": 1.5, "negative_prompts": bare},
        ),
        "spread": ({"heads": "L1H2", "rule": "decore"}, bare, {"rule": "decore", "heads": "L1H2"}),
        "target": (
            {"heads": "L1H2", "target_kl": 0.1},
            bare,
            {"heads": "L1H2", "decode_config": dps.DecodeConfig(target_kl=0.1)},
        ),
    }


NAMES = ["off", "named heads", "strength 0", "profile", "profile, other strength", "profile, no documents",
         "profile, not steered", "cap", "vector", "another's vector", "documents against none", "patched", "spread",
         "target"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_chat_is_what_generate_writes(client, model, name):
    steer, prompt, options = cases(model)[name]
    body = {} if steer is None else {"dps": {**steer, "report": True}}
    own = generated(model, prompt, **options)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, extra_body=body)
    choice = answer.choices[0]
    assert choice.message.content == own.texts[0]
    ends = end_tokens(model)
    kept = [at for at, token in enumerate(own.tokens[0].tolist()) if token not in ends]
    assert [one.token for one in choice.logprobs.content] == [own.pieces[0][at] for at in kept]
    found = torch.tensor([one.logprob for one in choice.logprobs.content])
    assert torch.allclose(found, own.logprobs[0][kept], atol=1e-3)
    assert all(one.top_logprobs[0].logprob >= one.top_logprobs[1].logprob for one in choice.logprobs.content)
    assert all(one.token == one.top_logprobs[0].token for one in choice.logprobs.content)
    assert answer.usage.prompt_tokens == len(prompt.prompt_tokens)
    if steer is not None:
        kl = [torch.nan if one is None else one for one in choice.dps["kl"]]
        assert torch.allclose(torch.tensor(kl), own.kl[0][kept], atol=1e-4, equal_nan=True)
    streamed, roles = "", []
    for chunk in client.chat.completions.create(**asked, stream=True, extra_body=body):
        streamed += chunk.choices[0].delta.content or ""
        roles.append(chunk.choices[0].delta.role)
    assert streamed == choice.message.content
    assert roles[0] == "assistant"
    assert not any(roles[1:])


def test_unsteered_it_is_the_models_own_text(client, tinies):
    """Against transformers alone: its chat template, its generate."""
    plain, tokenizer = tinies("llama").plain, tinies("llama").hooked.tokenizer
    encoded = tokenizer.apply_chat_template(
        CONVERSATION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with torch.no_grad():
        ids = plain.generate(**encoded, max_new_tokens=20, do_sample=False, eos_token_id=ends, pad_token_id=0)
    text = tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = client.chat.completions.create(model="tiny", messages=CONVERSATION, temperature=0, max_tokens=20)
    assert answer.choices[0].message.content == text


def test_completions_go_on_from_texts(client, model):
    prompts = ["The bread", "In the beginning there was"]
    own = generated(model, prompts, heads="L1H2", max_new_tokens=9, gamma=2.0)
    asked = {"model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 9, "logprobs": 1}
    body = {"dps": {"heads": "L1H2", "gamma": 2}}
    answer = client.completions.create(**asked, extra_body=body)
    assert [one.text for one in answer.choices] == own.texts
    assert [one.index for one in answer.choices] == [0, 1]
    streamed, finish = ["", ""], {}
    for chunk in client.completions.create(**asked, stream=True, extra_body=body):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            finish[choice.index] = choice.finish_reason
    assert streamed == own.texts
    assert set(finish.values()) <= {"stop", "length"}
    negative = {"dps": {"rule": "cad", "alpha": 1, "negative_prompt": "The"}}
    own = generated(model, prompts[0], rule="cad", alpha=1.0, negative_prompts="The", max_new_tokens=9)
    asked["prompt"] = prompts[0]
    assert client.completions.create(**asked, extra_body=negative).choices[0].text == own.texts[0]


def test_seeds_make_texts_again(client, model):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, "n": 3}
    options = {"seed": 7, "temperature": 0.9, "top_p": 0.8, "extra_body": {"dps": {"heads": "L1H2"}}}
    texts = [one.message.content for one in client.chat.completions.create(**asked, **options).choices]
    sampling = [dps.Sampling(temperature=0.9, top_p=0.8, seed=7 + text) for text in range(3)]
    own = generated(model, [shown(model, documents=())] * 3, heads="L1H2", sampling=sampling)
    assert texts == own.texts
    assert len(set(texts)) == 3
    free = {client.chat.completions.create(**asked).choices[0].message.content for _ in range(3)}
    assert len(free) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_an_answer_before_it(web, model, stream):
    whole = generated(model, shown(model, documents=()), rule="greedy").texts[0]
    stop = whole[5:9]
    answer = ask(web, stop=[stop, "never there"], stream=stream)
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
        text = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks)
        finish = chunks[-1]["choices"][0]["finish_reason"]
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        choice = answer.json()["choices"][0]
        text, finish = choice["message"]["content"], choice["finish_reason"]
    assert text == whole[: whole.index(stop)]
    assert finish == "stop"


def test_an_answer_is_sent_back_as_it_came(client):
    """Its fields that hold nothing ask for nothing."""
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    said = client.chat.completions.create(messages=CONVERSATION[:2], **asked).choices[0].message
    more = [*CONVERSATION[:2], said.model_dump(), {"role": "user", "content": "And rolls?"}]
    plain = [
        *CONVERSATION[:2],
        {"role": "assistant", "content": said.content},
        {"role": "user", "content": "And rolls?"},
    ]
    options = {"seed": -3, "response_format": {"type": "text"}, "service_tier": "auto"}
    one = client.chat.completions.create(messages=more, **asked, **options)
    assert (
        one.choices[0].message.content
        == client.chat.completions.create(messages=plain, **asked).choices[0].message.content
    )


def test_a_cap_of_a_profile_can_be_lifted(client, model):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 12}
    own = generated(model, shown(model, documents=()), heads=SETS["bob"]).texts[0]
    answer = client.chat.completions.create(**asked, extra_body={"dps": {"user": "bob", "max_kl": None}})
    assert answer.choices[0].message.content == own


def test_a_vector_alone_is_added(client, model):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 12}
    own = generated(model, shown(model, documents=()), rule="head_vector", vectors=vector_of(model)).texts[0]
    answer = client.chat.completions.create(**asked, extra_body={"dps": {"vector": "eve"}})
    assert answer.choices[0].message.content == own


def test_offsets_of_a_stream_go_on(client):
    asked = {"model": "tiny", "prompt": "The bread", "temperature": 0, "max_tokens": 9, "logprobs": 1}
    whole = client.completions.create(**asked).choices[0].logprobs
    offsets = [
        at for chunk in client.completions.create(**asked, stream=True) for at in chunk.choices[0].logprobs.text_offset
    ]
    assert offsets == whole.text_offset == sorted(offsets)


def test_usage_of_a_stream_stands_in_its_last_chunk(client):
    asked = {"model": "tiny", "messages": CONVERSATION, "temperature": 0, "max_tokens": 6}
    whole = client.chat.completions.create(**asked).usage
    *chunks, last = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert not last.choices
    assert last.usage == whole
    assert all(one.usage is None for one in chunks)


def test_text_parts_and_developers_are_read(web):
    parts = [{"type": "text", "text": "How do I "}, {"type": "text", "text": "bake bread?"}]
    one = ask(web, messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}])
    other = ask(web, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    assert one.json()["choices"] == other.json()["choices"]


def test_a_servers_default_steers_those_who_say_nothing(model):
    from dps_lens.serving import Served, Steering, make_server

    default = Steering(rule="dps", heads=HeadSet.parse("L1H2"), gamma=2.0)
    own = generated(model, shown(model, documents=()), heads="L1H2", gamma=2.0).texts[0]
    plain = generated(model, shown(model, documents=()), rule="greedy").texts[0]
    with (
        Served(make_server(model, name="tiny", default=default)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client,
    ):
        asked = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        for steer, text in ((None, own), ({"rule": "greedy"}, plain), ({"report": True}, own)):
            body = {} if steer is None else {"dps": steer}
            answer = client.chat.completions.create(**asked, max_tokens=12, extra_body=body)
            assert answer.choices[0].message.content == text


def test_the_model_is_named(client, web):
    assert [one.id for one in client.models.list()] == ["tiny"] == [client.models.retrieve("tiny").id]
    with pytest.raises(openai.NotFoundError, match="not served here; it is 'tiny'"):
        client.models.retrieve("gpt")
    assert web.get("/healthz").json()["status"] == "ok"
    numbers = web.get("/metrics").text
    assert 'dps_lens_requests_total{path="/v1/models",status="200"}' in numbers
    assert "dps_lens_tokens_total" in numbers
    assert "dps_lens_first_token_seconds_bucket" in numbers
