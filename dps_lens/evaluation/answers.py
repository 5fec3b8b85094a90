"""What is measured of one answer, whatever wrote it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from dps_lens.data import Example, Prompt
from dps_lens.data.copied import copied_tokens
from dps_lens.data.tokenizer import without_special
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.metrics import Metric, score_text
from dps_lens.evaluation.result import REFERENCE
from dps_lens.evaluation.style import StyleMeasure
from dps_lens.model import HookedModel, native_attention, runner_of
from dps_lens.model.losses import token_losses
from dps_lens.model.positions import check_switch

_NGRAM = 2


def text_of(model: HookedModel, tokens: Int[Tensor, " pos"]) -> str:
    """An answer as text."""
    return model.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def measured(
    model: HookedModel,
    example: Example,
    answers: Mapping[str, Int[Tensor, " _"]],
    nlls: Sequence[float],
    style: StyleMeasure | None,
    metrics: Sequence[Metric],
    profile: Sequence[int],
) -> list[dict[str, Any]]:
    """A row for every answer to an example.

    Args:
        model: its tokenizer is used.
        example: what was asked.
        answers: method → tokens; what the user wrote, as long as an answer may be, under `"reference"`.
        nlls: `fluency` of each.
        style: of the users; None where answers come from a closed set.
        metrics: what answers are measured by.
        profile: tokens of the user's own profile, as prompts show it.
    """
    rows = []
    for (method, tokens), nll in zip(answers.items(), nlls, strict=True):
        text, ids = text_of(model, tokens), without_special(model, tokens).tolist()
        row: dict[str, Any] = {"user": example.user_id, "example": example.id, "method": method, "text": text}
        row["reference"] = example.reference
        row |= {} if method == REFERENCE else score_text(metrics, example.reference, text)
        if style is not None:
            row |= {"style": style(example.user_id, text), "author": style.author(example.user_id, text)}
        copied = float(copied_tokens(ids, profile, _NGRAM).mean()) if ids else 0.0
        rows.append(row | {"NLL": nll, "repeated": repeated(ids), "copied": copied, "tokens": len(ids)})
    return rows


@torch.inference_mode()
def fluency(model: HookedModel, prompt: Prompt, answers: Sequence[Int[Tensor, " _"]]) -> Float64[Tensor, " answer"]:
    """NLL of each answer under the unsteered model after a prompt, nats per token; NaN where there is none."""
    runner = runner_of(model)
    tokens = prompt.prompt_tokens[None].to(runner.device)
    nlls = torch.full((len(answers),), torch.nan, dtype=torch.float64)
    with native_attention(model):
        cache = runner.prefill(tokens[:, :-1])
        for index, answer in enumerate(answers):
            if len(answer):
                check_switch(model, "evaluate", tokens.shape[1] - 1, tokens.shape[1] + len(answer) - 1)
                targets = answer.to(runner.device)
                inputs = torch.cat([tokens[:, -1:], targets[None, :-1]], dim=1)
                logits = runner.logits(inputs, prompt=cache, keep=len(targets))[0]
                nlls[index] = token_losses(logits, targets).double().mean().cpu()
                if not bool(torch.isfinite(nlls[index])):
                    raise EvaluationError(
                        f"evaluate: the NLL of an answer to {prompt.example_id!r} is {float(nlls[index])}; load the "
                        "model in float32 or bfloat16, or let check_model(model) look at its weights"
                    )
    return nlls


def profile_of(prompt: Prompt) -> list[int]:
    """Tokens of the documents that a prompt shows, −1 between them, where no answer continues."""
    parts = [[*prompt.tokens[start:stop].tolist(), -1] for start, stop in prompt.items]
    return [int(token) for part in parts for token in part]


def repeated(tokens: Sequence[int]) -> float:
    """Share of 3-grams that were there before."""
    grams = list(zip(*(tokens[shift:] for shift in range(3)), strict=False))
    return 1 - len({*grams}) / len(grams) if grams else 0.0
