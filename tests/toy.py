"""A two-layer model with hand-set weights in which one head, L1H2, carries the profile.

Every user has a signature word that opens all titles. Signature words hold one of the dimensions
0–7; L1H2 attends to them (its query is a constant, its key reads those dimensions) and copies the
dimension it finds to 8–15, which the unembedding reads. The other heads and the MLPs only add noise.
"""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SIGNATURES = [f"sig{index}" for index in range(8)]
WORDS = [
    "river",
    "stone",
    "cloud",
    "lamp",
    "garden",
    "paper",
    "window",
    "bread",
    "wheel",
    "bird",
    "letter",
    "road",
    "glass",
]
FRAME = ["Earlier", "texts", "by", "this", "user", ":", '"', "is", "the"]
FRAME += ["title", "for", "Generate", "a", "headline", "following", "article", "Answer"]
CARRIER = (1, 2)
D_MODEL, N_HEADS, D_HEAD = 64, 4, 16


def tokenizer_of(vocabulary: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that knows whole words only, and writes no chat."""
    ids = {word: index for index, word in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def build(folder: Path) -> Path:
    vocabulary = ["<unk>", "<s>", "</s>", *SIGNATURES, *WORDS, *FRAME]
    ids = {word: index for index, word in enumerate(vocabulary)}
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_embd=D_MODEL,
        n_layer=2,
        n_head=N_HEADS,
        n_positions=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = ".ln_" in name
            parameter.copy_(
                torch.ones_like(parameter) if is_norm and name.endswith("weight") else torch.zeros_like(parameter)
            )
        words = noise(len(vocabulary), D_MODEL - 16, scale=1.0)
        words = words - words.mean(-1, keepdim=True)
        embedding = torch.zeros(len(vocabulary), D_MODEL)
        embedding[:, 16:] = 4 * words / words.norm(dim=-1, keepdim=True)
        for index, word in enumerate(SIGNATURES):
            embedding[ids[word]] = 0
            embedding[ids[word], index] = 4
        model.transformer.wte.weight.copy_(embedding)
        for layer, block in enumerate(model.transformer.h):
            block.attn.c_attn.weight.copy_(noise(D_MODEL, 3 * D_MODEL, scale=0.02))
            block.attn.c_proj.weight.copy_(noise(D_MODEL, D_MODEL, scale=0.02))
            if layer == CARRIER[0]:
                head = slice(CARRIER[1] * D_HEAD, (CARRIER[1] + 1) * D_HEAD)
                query, key, value = (block.attn.c_attn.weight[:, part * D_MODEL :][:, head] for part in range(3))
                for part in (query, key, value):
                    part.zero_()
                block.attn.c_attn.bias[head][0] = 6.0
                key[:8, 0] = 2.0
                value[:8, :8] = torch.eye(8)
                block.attn.c_proj.weight[head] = 0
                block.attn.c_proj.weight[head][:8, 8:16] = 4 * torch.eye(8)
        for index, word in enumerate(SIGNATURES):
            model.lm_head.weight[ids[word], 8 + index] = 2.0
    model.save_pretrained(folder)
    tokenizer_of(vocabulary).save_pretrained(folder)
    return folder


def records() -> list[dict]:
    """Eight dated documents for each of six users; titles are the signature and a word that differs."""
    found = []
    for user in range(6):
        for number in range(8):
            first = (3 * user + number) % len(WORDS)
            body = [WORDS[(first + 2 * step + user) % len(WORDS)] for step in range(12)]
            found.append(
                {
                    "user_id": f"u{user}",
                    "id": f"u{user}-{number}",
                    "date": f"2024-01-{number + 1:02d}",
                    "title": f"{SIGNATURES[user]} {WORDS[first]}",
                    "text": " ".join(body),
                }
            )
    return found
