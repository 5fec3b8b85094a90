"""SteerX (arXiv 2510.22256): a steering vector of those tokens of a history that only its user explains."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dps_lens.data import Example, Note, Prompt, PromptConfig, User, build_prompt, chat_prompt
from dps_lens.errors import SteeringError
from dps_lens.model import HookedModel
from dps_lens.model.losses import token_losses
from dps_lens.steering.generate import generate
from dps_lens.vectors.residuals import logits_and_residuals
from dps_lens.vectors.style import SteeringVector, layer_and_examples, style_differences

Backbone: TypeAlias = Literal["means", "style"]

_ASK = (
    "Here are words and phrases that one person prefers when writing:\n{pieces}\n\n"
    "Describe this person's preferences and writing style in two sentences."
)
_MOST_PIECES, _DESCRIPTION_TOKENS = 40, 64
_PROFILES: tuple[Literal["own", "none"], ...] = ("own", "none")


def steerx_vector(
    model: HookedModel,
    user: User,
    *,
    layer: int | None = None,
    backbone: Backbone = "means",
    threshold: float = 1.0,
    description: "str | Callable[[Sequence[str]], str] | None" = None,
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
) -> SteeringVector:
    """The disentangled steering vector of a user.

    A token t of a document is preference-driven where `δ_t = log p(t | rest of the history) − log p(t | nothing)` is
    above a threshold. These tokens are put into a short description S of the user, and

        v = mean over preference-driven tokens of ½ [h(history) − h(nothing)] + ½ [h(S) − h(nothing)],

    h being the residual stream that leaves a layer. The formulas are those of a re-implementation; where the paper
    leaves a choice: h is read where a token is predicted from, since that is where the vector is added; the tokens
    reach the description as their unbroken runs, in order; the model itself writes the description, greedily.

    Args:
        model: a hooked model.
        user: whose discovery examples are read; never the evaluation examples.
        layer: half way up by default.
        backbone: `"means"` as above; `"style"` puts the style vector (`style_vector`) in place of the first half,
            each document weighing as many times as it has preference-driven tokens.
        threshold: of δ, nats.
        description: S itself, or what makes S of the preference-driven pieces of text (an endpoint, say).
        max_examples: the newest so many discovery examples; all by default.
        prompt_config: how prompts are built.

    Raises:
        HeadError: the layer is not in the model.
        SteeringError: the user has no discovery example, or no token is above the threshold.
    """
    at, chosen = layer_and_examples("steerx_vector", model, user, layer, max_examples)
    steerx = steerx_vectors(
        model, chosen, backbone=backbone, threshold=threshold, description=description, prompt_config=prompt_config
    )
    about = {"user": user.id, "examples": [example.id for example in chosen], "description": steerx.description}
    return SteeringVector(
        steerx.values[at], at, "steerx", about | {"pieces": list(steerx.pieces), "share": steerx.share}
    )


class NothingDrivenError(SteeringError):
    """No token is above the threshold."""


@dataclass(frozen=True)
class SteerX:
    """What SteerX makes of a user's documents.

    Attributes:
        values: the vector at every layer.
        description: of the user.
        pieces: runs of preference-driven tokens, as text.
        share: of all tokens that are preference-driven.
    """

    values: Float[Tensor, "layer d_model"]
    description: str
    pieces: tuple[str, ...]
    share: float


@torch.no_grad()
def steerx_vectors(
    model: HookedModel,
    examples: Sequence[Example],
    *,
    backbone: Backbone = "means",
    threshold: float = 1.0,
    description: "str | Callable[[Sequence[str]], str] | None" = None,
    prompt_config: PromptConfig | None = None,
) -> SteerX:
    """The vector of these examples at every layer; arguments as in `steerx_vector`."""
    if backbone not in ("means", "style"):
        raise SteeringError(f"steerx_vector: backbone {backbone!r} is unknown; use 'means' or 'style'")
    states: dict[str, list[Tensor]] = {"own": [], "none": []}
    driven, pieces = [], []
    for example in examples:
        losses = {}
        for profile in _PROFILES:
            built = build_prompt(model, example, profile, config=prompt_config)
            losses[profile], residuals = read_response(model, built)
            states[profile].append(residuals)
        driven.append(losses["none"] - losses["own"] > threshold)
        pieces += _runs(model, built.response_tokens.tolist(), driven[-1])
    chosen = torch.cat(driven)
    if not chosen.any():
        raise NothingDrivenError(
            f"steerx_vector: no token of {len(examples)} documents is {threshold} nats likelier with the history; "
            "lower threshold="
        )
    text = (
        description
        if isinstance(description, str)
        else (description or partial(_describe, model, prompt_config))(pieces)
    )
    if not text.strip():
        raise SteeringError("steerx_vector: the description is empty; give description=")
    described = [
        read_response(model, build_prompt(model, example, Note(text), config=prompt_config))[1] for example in examples
    ]
    nothing = torch.cat(states["none"], dim=1)[:, chosen]
    by_description = (torch.cat(described, dim=1)[:, chosen] - nothing).mean(1)
    if backbone == "means":
        by_history = (torch.cat(states["own"], dim=1)[:, chosen] - nothing).mean(1)
    else:
        counts = torch.tensor([float(one.sum()) for one in driven])
        differences = style_differences(model, examples, prompt_config=prompt_config)
        by_history = (counts[:, None, None] * differences).sum(0) / counts.sum()
    share = float(chosen.float().mean())
    return SteerX((by_history + by_description) / 2, text, tuple(pieces), share)


def read_response(
    model: HookedModel, prompt: Prompt
) -> tuple[Float[Tensor, " pos"], Float[Tensor, "layer pos d_model"]]:
    """−log p of each response token, and the residual stream that leaves every layer where it is predicted from."""
    start, stop = prompt.spans["response"]
    logits, states = logits_and_residuals(model, prompt.tokens[: stop - 1], stop - start)
    return token_losses(logits, prompt.tokens[start:stop]).cpu(), states


def _runs(model: HookedModel, tokens: Sequence[int], driven: Bool[Tensor, " pos"]) -> list[str]:
    """Unbroken runs of chosen tokens, as text."""
    runs: list[list[int]] = [[]]
    for token, chosen in zip(tokens, driven.tolist(), strict=True):
        if chosen:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [text for run in runs if (text := model.tokenizer.decode(run, skip_special_tokens=True).strip())]


def _describe(model: HookedModel, prompt_config: PromptConfig | None, pieces: Sequence[str]) -> str:
    """The model's own description of a user, of the first pieces."""
    text = _ASK.format(pieces=", ".join(dict.fromkeys(pieces[:_MOST_PIECES])))
    asked = chat_prompt(model, text, chat_template_kwargs=(prompt_config or PromptConfig()).chat_template_kwargs)
    written = generate(model, asked, rule="greedy", max_new_tokens=_DESCRIPTION_TOKENS)
    return written.texts[0].strip() or ", ".join(pieces[:_MOST_PIECES])
