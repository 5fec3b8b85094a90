"""StyleVector (arXiv 2503.05213): how a user's answers differ from generic ones, as a direction."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.data import Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.examples import newest
from dps_lens.data.tokenizer import PromptTokenizer, without_special
from dps_lens.errors import HeadError, SteeringError
from dps_lens.model import HookedModel
from dps_lens.steering.generate import generate
from dps_lens.steering.vector import SteeringVector
from dps_lens.vectors.residuals import last_residuals


def style_vector(
    model: HookedModel,
    user: User,
    *,
    layer: int | None = None,
    generic: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    max_new_tokens: int | None = None,
) -> SteeringVector:
    """StyleVector (arXiv 2503.05213): `mean of h(x ⊕ y) − h(x ⊕ ŷ)` over a user's history.

    h is the residual stream that leaves a layer at the last token, x the task input of a document without any
    profile, y what the user wrote, and ŷ a generic answer. The paper leaves open who writes ŷ; here the model itself,
    greedily, from the same prompt.

    Args:
        model: a hooked model.
        user: whose discovery examples are read; never the evaluation examples.
        layer: half way up by default.
        generic: generic answers by the id of the discovery example, instead of the model's own.
        max_examples: the newest so many discovery examples; all by default.
        prompt_config: how prompts are built.
        max_new_tokens: length of a generic answer; by default what the task needs, and no more than `response_tokens`
            of the prompt's configuration, at which the user's own texts are cut.

    Raises:
        HeadError: the layer is not in the model.
        SteeringError: the user has no discovery example, or `generic` lacks one.
    """
    at, chosen = layer_and_examples("style_vector", model, user, layer, max_examples)
    differences = style_differences(
        model, chosen, generic=generic, prompt_config=prompt_config, max_new_tokens=max_new_tokens
    )
    return SteeringVector(
        differences[:, at].mean(0), at, "style", {"user": user.id, "examples": [example.id for example in chosen]}
    )


def layer_and_examples(
    call: str, model: HookedModel, user: User, layer: int | None, max_examples: int | None
) -> tuple[int, Sequence[Example]]:
    """The layer of a vector, half way up by default, and the discovery examples that it is made of.

    Raises:
        HeadError: the layer is not in the model.
        SteeringError: the user has no discovery example.
    """
    at = model.cfg.n_layers // 2 if layer is None else layer
    if not 0 <= at < model.cfg.n_layers:
        raise HeadError(f"{call}: layer {at} is not in this model of {model.cfg.n_layers} layers")
    examples = user.discovery_examples()
    if not examples:
        raise SteeringError(f"{call}: user {user.id!r} has no discovery example; leave the user out")
    return at, newest(examples, max_examples)


@torch.no_grad()
def style_differences(
    model: HookedModel,
    examples: Sequence[Example],
    *,
    generic: Mapping[str, str] | None = None,
    prompt_config: PromptConfig | None = None,
    max_new_tokens: int | None = None,
) -> Float[Tensor, "example layer d_model"]:
    """One example a row of what the style vector is the mean of, at every layer; arguments as in `style_vector`."""
    config = prompt_config or PromptConfig()
    dull = generic_answers("style_vector", model, examples, generic=generic, config=config, length=max_new_tokens)
    differences = []
    for example, other in zip(examples, dull, strict=True):
        built = build_prompt(model, example, "none", config=config)
        differences.append(last_residuals(model, built.tokens) - last_residuals(model, other.tokens))
    return torch.stack(differences)


def generic_answers(
    call: str,
    model: HookedModel,
    examples: Sequence[Example],
    *,
    generic: Mapping[str, str] | None,
    config: PromptConfig,
    length: int | None = None,
) -> list[Prompt]:
    """The prompt of each example without a profile, with a generic answer in place of the user's.

    Raises:
        SteeringError: `generic` lacks an answer; names the call.
    """
    tokenizer, prompts = PromptTokenizer(model), []
    for example in examples:
        built = build_prompt(model, example, "none", config=config)
        if generic is None:
            longest = min(example.task.max_new_tokens, config.response_tokens or example.task.max_new_tokens)
            answer = _own_answer(model, built, length or longest)
        elif example.id in generic:
            answer = torch.tensor(tokenizer.answer(generic[example.id], config.response_tokens), dtype=torch.long)
        else:
            raise SteeringError(f"{call}: generic= holds no answer to example {example.id!r}")
        tokens = torch.cat([built.prompt_tokens, answer])
        spans = {**built.spans, "response": (len(built.prompt_tokens), len(tokens))}
        prompts.append(replace(built, tokens=tokens, spans=spans))
    return prompts


def _own_answer(model: HookedModel, prompt: Prompt, max_new_tokens: int) -> Int[Tensor, " pos"]:
    written = generate(model, prompt, rule="greedy", max_new_tokens=max_new_tokens)
    return without_special(model, written.tokens[0])
