"""GPT-2 models with hand-set weights, without MLPs, in which it is known what each head does.

The residual stream is cut into blocks of one-hot codes, each as wide as a head, so that a head that
reads one block and writes another has identity matrices for weights. Every position holds one unit of
its word and one of its place, so the norms before attention only scale.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from dps_lens.families import Needle, Task

N_HEADS, D_HEAD = 4, 128
UNIT = 16  # what one unit of two becomes in a norm over 512 dimensions
SPECIAL = ["<unk>", "<s>", "</s>", "Q", "A", "Answer", "What", ":", ".", "?"]


class Weights(NamedTuple):
    """Views of one head's weights, each `[d_model, d_head]` or its transpose."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    query_bias: Tensor


class Circuit:
    """A model whose heads do nothing yet; `head` gives the weights of one to fill in.

    Blocks 0 and 1 of the residual stream hold the word and the place.
    """

    def __init__(self, words: list[str], *, n_places: int) -> None:
        self.words = [*SPECIAL, *words]
        self.ids = {word: index for index, word in enumerate(self.words)}
        self.n_places = n_places
        assert len(self.ids) == len(self.words) <= D_HEAD
        config = transformers.GPT2Config(
            vocab_size=len(self.words),
            n_embd=N_HEADS * D_HEAD,
            n_layer=2,
            n_head=N_HEADS,
            n_inner=4,
            n_positions=n_places,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
        self.model = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            parameter.fill_(float(".ln_" in name and name.endswith("weight")))
        self.model.transformer.wte.weight[:, self.block(0)] = torch.eye(len(self.words), D_HEAD)
        self.model.transformer.wpe.weight[:, self.block(1)] = torch.eye(n_places, D_HEAD)
        # The other heads look about at random and write next to nothing.
        generator = torch.Generator().manual_seed(0)
        for layer in self.model.transformer.h:
            for weight, scale in ((layer.attn.c_attn.weight, 0.02), (layer.attn.c_proj.weight, 0.0005)):
                weight.copy_(scale * torch.randn(weight.shape, generator=generator))

    def block(self, number: int) -> slice:
        return slice(number * D_HEAD, (number + 1) * D_HEAD)

    def head(self, layer: int, head: int) -> Weights:
        attention, width, rows = self.model.transformer.h[layer].attn, N_HEADS * D_HEAD, self.block(head)
        query, key, value = (attention.c_attn.weight[:, part * width :][:, rows] for part in range(3))
        found = Weights(query, key, value, attention.c_proj.weight[rows], attention.c_attn.bias[rows])
        for weight in found:
            weight.zero_()
        return found

    def looks_back(self, weights: Weights, steps: int) -> None:
        """Let a head attend to the place `steps` before."""
        places = torch.eye(self.n_places, D_HEAD)
        weights.key[self.block(1)][: self.n_places] = places
        weights.query[self.block(1)][steps : self.n_places] = places[:-steps]

    def save(self, folder: Path) -> Path:
        inner = Tokenizer(models.WordLevel(self.ids, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder


PREVIOUS, DUPLICATE, INDUCTION, PARTIAL = (0, 1), (0, 3), (1, 2), (1, 0)
NEEDLES = tuple(
    Needle(f"{who} {verb}s {answer}.", f"What {verb} {who}?", answer)
    for who, verb, answer in (
        ("zebra", "hide", "apple pear plum"),
        ("otter", "carry", "violin"),
        ("badger", "paint", "seven green doors again"),
    )
)
FILLER = [f"filler{index}" for index in range(60)]


def haystack() -> tuple[str, ...]:
    """Paragraphs of sentences of three to six words, 200 words in all."""
    sentences, first = [], 0
    while first < 200:
        length = 3 + len(sentences) % 4
        sentences.append(" ".join(FILLER[(7 * word) % len(FILLER)] for word in range(first, first + length)) + ".")
        first += length
    return tuple(" ".join(sentences[start : start + 5]) for start in range(0, len(sentences), 5))


def copying(folder: Path, *, partial: bool = False) -> Path:
    """An induction circuit: it continues a word as it was continued before, and so copies a needle.

    `PREVIOUS` writes the word before into block 2. `INDUCTION` attends to places where block 2 holds the
    present word, and copies the word found there to block 3, which the unembedding reads. `DUPLICATE`
    attends to the same word, its own place included. With `partial`, `PARTIAL` does what `INDUCTION` does,
    but only from the verbs, so that it meets the first word of an answer alone.
    """
    stems = [word for needle in NEEDLES for word in needle.stem.split()]
    verbs = [needle.question.split()[1] for needle in NEEDLES]
    answers = [word for needle in NEEDLES for word in needle.answer.split()]
    circuit = Circuit([*stems, *verbs, *answers, *FILLER], n_places=128)
    eye = torch.eye(D_HEAD)

    previous = circuit.head(*PREVIOUS)
    circuit.looks_back(previous, 1)
    previous.value[circuit.block(0)] = eye
    previous.out[:, circuit.block(2)] = eye / UNIT

    duplicate = circuit.head(*DUPLICATE)
    duplicate.query[circuit.block(0)] = duplicate.key[circuit.block(0)] = eye

    induction = circuit.head(*INDUCTION)
    induction.query[circuit.block(0)] = induction.key[circuit.block(2)] = induction.value[circuit.block(0)] = eye
    induction.out[:, circuit.block(3)] = 4 * eye / UNIT

    if partial:
        some = circuit.head(*PARTIAL)
        some.key[circuit.block(2)] = eye
        for needle in NEEDLES:
            verb = circuit.ids[needle.stem.split()[-1]]
            some.query[circuit.block(0)][verb, verb] = 1

    circuit.model.lm_head.weight[:, circuit.block(3)] = torch.eye(len(circuit.words), D_HEAD)
    return circuit.save(folder)


MATCH, WORD, TASK = (0, 1), (0, 2), (1, 1)
INPUTS = [f"word{index}" for index in range(12)]
LANGUAGES = ("red", "green", "blue")


def language(name: str) -> Task:
    """Each input's translation: word7 → red7."""
    return Task(name, tuple((word, word.replace("word", name)) for word in INPUTS))


def translating(folder: Path) -> Path:
    """Translates a word into one of three languages; which one, it learns from the examples of the prompt.

    `MATCH`, at an output, attends three places back if the input there is the same word in another
    language (place and word count one unit each, BOS one and a half), else to BOS; inputs write a flag to
    block 2. `TASK`, at the last token, attends to flagged outputs, else to BOS, and writes their language to
    block 2: the function vector. `WORD` copies the word in question, two places before the last token, to
    block 3. The unembedding adds language and word. Where no example is right no output is flagged, and
    the three translations of the word share the probability.
    """
    outputs = [output for name in LANGUAGES for _, output in language(name).pairs]
    circuit = Circuit([*INPUTS, *outputs], n_places=64)
    bos, flag = circuit.ids["<s>"], circuit.block(2).start
    words = torch.tensor([circuit.ids[word] for word in INPUTS])
    content = torch.eye(D_HEAD)[64 : 64 + len(INPUTS)]  # above the places
    match, word, task = (circuit.head(*head) for head in (MATCH, WORD, TASK))

    circuit.looks_back(match, 3)
    match.key[words] = content
    match.key[bos, -1] = 1
    match.query_bias[-1] = 1.5 * UNIT
    match.value[words, 0] = 1 / UNIT
    match.out[0, flag] = 1

    circuit.looks_back(word, 2)
    word.value[words] = content / UNIT
    word.out[64 : 64 + len(INPUTS), circuit.block(3)] = 2 * torch.eye(len(INPUTS), D_HEAD)

    task.query_bias[0] = UNIT
    task.key[flag, 0], task.key[bos, 0] = 1, 0.5
    for number, name in enumerate(LANGUAGES):
        translations = torch.tensor([circuit.ids[output] for _, output in language(name).pairs])
        match.query[translations] = content
        task.value[translations, number] = 1 / UNIT
        task.out[number, flag + 1 + number] = 2
        circuit.model.lm_head.weight[translations, flag + 1 + number] = 1
        circuit.model.lm_head.weight[translations, circuit.block(3)] = torch.eye(len(INPUTS), D_HEAD)
    return circuit.save(folder)
