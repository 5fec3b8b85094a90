"""Users of a server, and requests to it."""

import torch

import dps_lens as dps
from dps_lens.heads import HeadSet
from dps_lens.serving import SteeringProfile, model_of
from dps_lens.serving.profiles import HeadRows, ProfileDocument

SETS = {"ann": "L0H1,L2H3", "bob": "L1H0"}
DOCUMENTS = ["Bread needs a cold night.", "I never knead; time does it.", "Salt goes in last."]


def profiles_of(model) -> list[SteeringProfile]:
    """Two users with heads, one of whom has documents, and one with a vector."""
    documents = [ProfileDocument(id=str(at), fields={"text": text}) for at, text in enumerate(DOCUMENTS)]
    generator = torch.Generator().manual_seed(1)
    rows = HeadRows(heads="L0H1,L2H3", values=torch.randn(2, model.cfg.d_head, generator=generator).tolist())
    about = {"model": model_of(model)}
    return [
        SteeringProfile(user="ann", heads=SETS["ann"], gamma=1.5, documents=documents, **about),
        SteeringProfile(user="bob", heads=SETS["bob"], max_kl=0.2, **about),
        SteeringProfile(user="eve", vector=rows, rule="head_vector", **about),
    ]


def vector_of(model) -> dps.HeadVector:
    vector = profiles_of(model)[2].head_vector()
    assert vector is not None
    return vector


def ask(web, text="How do I bake bread?", path="/v1/chat/completions", **fields):
    body = {"model": "tiny", "max_tokens": 12, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": text}]} if path.endswith("chat/completions") else {"prompt": text}
    return web.post(path, json=body | fields)


def generated(model, prompt, **options):
    """What the library writes for the same."""
    heads = options.pop("heads", None)
    options = {"max_new_tokens": 12, "rule": "dps", **options}
    return dps.generate(model, prompt, heads=HeadSet.parse(heads) if heads else None, **options)
