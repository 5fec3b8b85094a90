"""Small GPT-2s with hand-set weights, in which the heads that carry the profile are known.

Titles are `signature topic word`. A user's signature and topic stand in all titles of that user and in no text; the
last word differs. Each kind of word holds dimensions of its own, and a carrier copies the dimension that it finds in
the profile to where the unembedding reads it:

- `one`: L1H2 writes the signature.
- `redundant`: L0H1 writes the signature; the stronger L2H3 looks for signatures that nobody has written and writes
  them, so it does nothing until L0H1 is gone, or has written somebody else's.
- `chain`: L0H2 notes which signature it saw, where only L1H1 reads it; L1H1 looks for what is noted and writes it.
- `harmful`: L1H2 writes the signature, too; L0H3 says at every position that a word comes, without which the model
  expects the words that frame a prompt.
- `style_topic`: L1H0 writes the signature, where a title begins; L2H2 writes the topic, after a signature.

The other heads are noise, and the MLPs are empty.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import toy
import transformers
from torch import Tensor

import dps_lens as dps
from dps_lens.data import User, load_users
from dps_lens.heads import Head
from dps_lens.model import HookedModel

N_LAYERS, N_HEADS, D_HEAD = 3, 4, 16
D_MODEL = N_HEADS * D_HEAD
TOPICS = [f"topic{index}" for index in range(8)]

# What a dimension of the residual stream stands for.
SIGNATURE, SAID = range(8), range(8, 16)
NOTED = range(16, 24)
TOPIC, TOPIC_SAID = range(24, 32), range(32, 40)
ALWAYS, WORD_COMES = 40, 41
OTHER = range(42, D_MODEL)
TITLE_BEGUN = [*SIGNATURE, *TOPIC]

CARRIERS = {
    "one": [(1, 2)],
    "redundant": [(0, 1), (2, 3)],
    "chain": [(0, 2), (1, 1)],
    "harmful": [(1, 2)],
    "style_topic": [(1, 0), (2, 2)],
}
HARMFUL = Head(0, 3)
NAMES = list(CARRIERS)


class Planted(NamedTuple):
    """A model, users whose titles it knows how to read, and the heads that do it."""

    model: HookedModel
    users: list[User]
    carriers: frozenset[Head]


# A whole embedding after layer normalisation, and a write of strength 4 beside it.
_TOKEN, _WRITTEN = 7.6, 5.6
_STRENGTH, _SCORE = 4.0, 8.0


class Weights(NamedTuple):
    """Of one head: `[D_MODEL D_HEAD]`, the query's bias and the value's bias `[D_HEAD]`, and `[D_HEAD D_MODEL]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor
    value_bias: Tensor
    out: Tensor


def _nothing() -> Weights:
    into, bias = torch.zeros(D_MODEL, D_HEAD), torch.zeros(D_HEAD)
    return Weights(into.clone(), into.clone(), into.clone(), bias.clone(), bias.clone(), into.T.clone())


def _copier(source: range, target: range, strength: float = _STRENGTH) -> Weights:
    """A head that moves the identity of a word to other dimensions; where it looks is not set."""
    weights = _nothing()
    for channel, (read, write) in enumerate(zip(source, target, strict=True)):
        weights.value[read, channel] = 1 / _TOKEN
        weights.out[channel, write] = strength
    return weights


def _reader(source: range, target: range, *, unless: Iterable[int] = (), after: Iterable[int] = ()) -> Weights:
    """Looks for any word of a kind; `unless` the token itself is of these kinds, or only `after` those."""
    weights, channel = _copier(source, target), 8
    weights.key[source, channel] = 4 * _SCORE / _TOKEN
    weights.query_bias[channel] = -1 if after else 1
    weights.query[list(unless), channel] = -2 / _TOKEN
    weights.query[list(after), channel] = 2 / _TOKEN
    return weights


def _backup() -> Weights:
    """Looks for signatures that have not been written, and writes louder than what it stands in for."""
    weights = _copier(SIGNATURE, SAID, 1.5 * _STRENGTH)
    for channel, (own, said) in enumerate(zip(SIGNATURE, SAID, strict=True)):
        weights.key[own, channel] = 4 * _SCORE / _TOKEN
        weights.query[said, channel] = -1.5 / _WRITTEN
        weights.query[TITLE_BEGUN, channel] = -2 / _TOKEN
    weights.query_bias[:8] = 1
    return weights


def _follower() -> Weights:
    """Looks for the signature that has been noted."""
    weights = _copier(SIGNATURE, SAID)
    for channel, (own, noted) in enumerate(zip(SIGNATURE, NOTED, strict=True)):
        weights.key[own, channel] = 4 * _SCORE / _TOKEN
        weights.query[noted, channel] = 1 / _WRITTEN
    return weights


def _announcer() -> Weights:
    """The same everywhere, whatever it looks at."""
    weights = _nothing()
    weights.value_bias[0] = 1
    weights.out[0, WORD_COMES] = 2
    return weights


def _plants(name: str) -> dict[tuple[int, int], Weights]:
    if name == "one":
        return {(1, 2): _reader(SIGNATURE, SAID, unless=TITLE_BEGUN)}
    if name == "redundant":
        return {(0, 1): _reader(SIGNATURE, SAID, unless=TITLE_BEGUN), (2, 3): _backup()}
    if name == "chain":
        return {(0, 2): _reader(SIGNATURE, NOTED, unless=TITLE_BEGUN), (1, 1): _follower()}
    if name == "harmful":
        return {(1, 2): _reader(SIGNATURE, SAID, unless=TITLE_BEGUN), HARMFUL: _announcer()}
    return {
        (1, 0): _reader(SIGNATURE, SAID, unless=TITLE_BEGUN),
        (2, 2): _reader(TOPIC, TOPIC_SAID, after=SIGNATURE),
    }


def load(name: str, folder: Path) -> Planted:
    """Make the model `name` in a folder and load it."""
    carriers = frozenset(Head(*head) for head in CARRIERS[name])
    return Planted(dps.load_model(str(build(name, folder))), load_users(records()), carriers)


def build(name: str, folder: Path) -> Path:
    """Write the model `name` into a folder, with its tokenizer."""
    vocabulary = ["<unk>", "<s>", "</s>", *toy.SIGNATURES, *TOPICS, *toy.WORDS, *toy.FRAME]
    ids = {word: index for index, word in enumerate(vocabulary)}
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_positions=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    generator = torch.Generator().manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.fill_(float(".ln_" in parameter_name and parameter_name.endswith("weight")))
        model.transformer.wte.weight.copy_(_embedding(ids, generator))
        for block in model.transformer.h:
            block.attn.c_attn.weight.copy_(0.04 * torch.randn(D_MODEL, 3 * D_MODEL, generator=generator))
            block.attn.c_proj.weight.copy_(0.04 * torch.randn(D_MODEL, D_MODEL, generator=generator))
        for (layer, head), weights in _plants(name).items():
            _plant(model.transformer.h[layer].attn, head, weights)
        for words, said in ((toy.SIGNATURES, SAID), (TOPICS, TOPIC_SAID)):
            for word, dimension in zip(words, said, strict=True):
                model.lm_head.weight[ids[word], dimension] = 1.2
        if name == "harmful":
            frame = [ids[word] for word in ("<s>", "</s>", *toy.FRAME)]
            model.lm_head.weight[frame, ALWAYS] = 4
            model.lm_head.weight[frame, WORD_COMES] = -4
    model.save_pretrained(folder)
    toy.tokenizer_of(vocabulary).save_pretrained(folder)
    return folder


def _embedding(ids: dict[str, int], generator: torch.Generator) -> Tensor:
    """A dimension a signature or topic, random directions for the rest, all of length 4; and 1 in `ALWAYS`."""
    other = torch.randn(len(ids), len(OTHER), generator=generator)
    other -= other.mean(-1, keepdim=True)
    embedding = torch.zeros(len(ids), D_MODEL)
    embedding[:, OTHER] = 4 * other / other.norm(dim=-1, keepdim=True)
    for words, dimensions in ((toy.SIGNATURES, SIGNATURE), (TOPICS, TOPIC)):
        for word, dimension in zip(words, dimensions, strict=True):
            embedding[ids[word]] = 0
            embedding[ids[word], dimension] = 4
    embedding[:, ALWAYS] = 1
    return embedding


def _plant(attention: torch.nn.Module, head: int, weights: Weights) -> None:
    columns = slice(head * D_HEAD, (head + 1) * D_HEAD)
    query, key, value = attention.c_attn.weight.split(D_MODEL, dim=1)
    query[:, columns], key[:, columns], value[:, columns] = weights.query, weights.key, weights.value
    query_bias, _, value_bias = attention.c_attn.bias.split(D_MODEL)
    query_bias[columns], value_bias[columns] = weights.query_bias, weights.value_bias
    attention.c_proj.weight[columns] = weights.out


def records() -> list[dict]:
    """Eight dated documents for each of eight users."""
    found = []
    for user in range(8):
        for number in range(8):
            first = (3 * user + number) % len(toy.WORDS)
            body = [toy.WORDS[(first + 2 * step + user) % len(toy.WORDS)] for step in range(12)]
            found.append(
                {
                    "user_id": f"u{user}",
                    "id": f"u{user}-{number}",
                    "date": f"2024-01-{number + 1:02d}",
                    "title": f"{toy.SIGNATURES[user]} {TOPICS[(3 * user + 1) % 8]} {toy.WORDS[first]}",
                    "text": " ".join(body),
                }
            )
    return found
