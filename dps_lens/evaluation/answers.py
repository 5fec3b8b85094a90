"""What is measured of one answer, whatever wrote it."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from dps_lens.data import Example, Prompt
from dps_lens.data.copied import copied_tokens
from dps_lens.data.tokenizer import without_special
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.forced import Steered
from dps_lens.evaluation.methods import Writer
from dps_lens.evaluation.metrics import METRICS, Metric, score_text
from dps_lens.evaluation.result import REFERENCE
from dps_lens.evaluation.style import StyleMeasure
from dps_lens.model import HookedModel, native_attention, runner_of
from dps_lens.model.losses import token_losses
from dps_lens.model.positions import check_switch
from dps_lens.scoring import Choice, answers_of
from dps_lens.scoring.ranks import measures_of_ranks

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
    ranks: Mapping[str, Mapping[str, float]] | None = None,
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
        ranks: method → `rank_scores`, where answers are compared.
    """
    rows = []
    for (method, tokens), nll in zip(answers.items(), nlls, strict=True):
        text, ids = text_of(model, tokens), without_special(model, tokens).tolist()
        row: dict[str, Any] = {"user": example.user_id, "example": example.id, "method": method, "text": text}
        row["reference"] = example.reference
        row |= {} if method == REFERENCE else score_text(metrics, example.reference, text)
        row |= (ranks or {}).get(method, {})
        if style is not None:
            row |= {"style": style(example.user_id, text), "author": style.author(example.user_id, text)}
        copied = float(copied_tokens(ids, profile, _NGRAM).mean()) if ids else 0.0
        rows.append(row | {"NLL": nll, "repeated": repeated(ids), "copied": copied, "tokens": len(ids)})
    return rows


@torch.inference_mode()
def rank(
    model: HookedModel, prompts: Mapping[str, Prompt], writers: Sequence[Writer]
) -> dict[str, Float64[Tensor, "..."]]:
    """How likely every writer finds each answer of an example, teacher-forced.

    Args:
        model: a hooked model.
        prompts: by what they show, with the answers.
        writers: methods with settings.

    Returns:
        `ranks`, `Float64[Tensor, "writer answer"]`, mean NLL over the tokens of an answer, the user's own first; and
        `length`, `Float64[Tensor, "answer"]`, tokens.

    Raises:
        PromptError: two answers are the same, or one is empty.
    """
    answers = {name: answers_of(prompt, Choice()) for name, prompt in prompts.items()}
    lengths = torch.tensor([len(one.response_tokens) for one in answers["own"]], dtype=torch.float64)
    nlls = torch.empty(len(writers), len(lengths), dtype=torch.float64)
    groups: dict[tuple[str, int | None], list[int]] = {}
    for index, writer in enumerate(writers):
        # Every adapter is a model of its own.
        groups.setdefault((writer.method.shows, index if writer.adapter else None), []).append(index)
    for (shows, _), members in groups.items():
        first = writers[members[0]]
        with first.adapter.on(model, first.setting.strength) if first.adapter else nullcontext():
            for place, prompt in enumerate(answers[shows]):
                steered = Steered(model, prompt, answers["none"][place])
                for index in members:
                    writer = writers[index]
                    heads = dict.fromkeys(writer.heads, 1.0)
                    logits = steered.logits(writer.method.rule, writer.given, heads, writer.vector)
                    nlls[index, place] = token_losses(logits, steered.targets).double().mean().cpu()
    if not bool(torch.isfinite(nlls).all()):
        raise EvaluationError(
            f"evaluate: an answer to {prompts['own'].example_id!r} has no finite likelihood under some method; lower "
            "the strengths, load the model in float32 or bfloat16, or see check_model(model)"
        )
    return {"ranks": nlls, "length": lengths}


def rank_scores(nll: Float64[Tensor, " answer"], length: Float64[Tensor, " answer"]) -> dict[str, float]:
    """What `rank` says of one example, by metric; `accuracy` is what a written answer has."""
    found = measures_of_ranks(nll[None].numpy(), length[None].numpy())
    ranked = (metric.name for metric in METRICS.values() if metric.ranks)
    return {name: float(found[name.removeprefix("preference ")][0]) for name in ranked}


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
