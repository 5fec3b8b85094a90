"""What is measured of one answer, whatever wrote it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from dps_lens.data import Example, Prompt
from dps_lens.evaluation.metrics import score_example
from dps_lens.evaluation.result import REFERENCE
from dps_lens.evaluation.style import StyleMeasure
from dps_lens.model import HookedModel, Runner, native_attention
from dps_lens.scoring.branches import token_losses


def words(model: HookedModel, tokens: Int[Tensor, " pos"]) -> Int[Tensor, " _"]:
    """An answer without the tokens that end it."""
    special = torch.tensor(sorted({*model.tokenizer.all_special_ids}), dtype=tokens.dtype)
    return tokens[~torch.isin(tokens, special)]


def text_of(model: HookedModel, tokens: Int[Tensor, " pos"]) -> str:
    """An answer as text."""
    return model.tokenizer.decode(words(model, tokens)).strip()


def measured(
    model: HookedModel, example: Example, methods: Sequence[str], unit: Mapping[str, Tensor], style: StyleMeasure
) -> list[dict[str, Any]]:
    """A row for every method's answer to an example, and one for what the user wrote.

    Args:
        model: its tokenizer is used.
        example: what was asked.
        methods: names, in the order of the answers.
        unit: `tokens.0`, `tokens.1`, …, and `fluency` of each and of what the user wrote.
        style: of the users.
    """
    about: dict[str, Any] = {"user": example.user_id, "example": example.id}
    found = []
    for index, (method, nll) in enumerate(zip([*methods, REFERENCE], unit["fluency"].tolist(), strict=True)):
        if method == REFERENCE:
            text, scores = example.reference, {}
            tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text, tokens = text_of(model, unit[f"tokens.{index}"]), words(model, unit[f"tokens.{index}"]).tolist()
            scores = score_example(example, text)
        row = about | {"method": method, "text": text, "reference": example.reference, **scores}
        row |= {"style": style(example.user_id, text), "NLL": nll, "repeated": repeated(tokens), "tokens": len(tokens)}
        found.append(row)
    return found


@torch.inference_mode()
def fluency(model: HookedModel, prompt: Prompt, answers: Sequence[Int[Tensor, " _"]]) -> Float64[Tensor, " answer"]:
    """NLL of each answer under the unsteered model after a prompt, nats per token; NaN where there is none."""
    runner = Runner.of(model)
    tokens = prompt.prompt_tokens[None].to(runner.device)
    found = torch.full((len(answers),), torch.nan, dtype=torch.float64)
    with native_attention(model):
        cache = runner.prefill(tokens[:, :-1])
        for index, answer in enumerate(answers):
            if len(answer):
                targets = answer.to(runner.device)
                inputs = torch.cat([tokens[:, -1:], targets[None, :-1]], dim=1)
                logits = runner.logits(inputs, prompt=cache, keep=len(targets))[0]
                found[index] = token_losses(logits, targets).double().mean().cpu()
    return found


def repeated(tokens: Sequence[int]) -> float:
    """Share of 3-grams that were there before."""
    grams = list(zip(*(tokens[shift:] for shift in range(3)), strict=False))
    return 1 - len({*grams}) / len(grams) if grams else 0.0
