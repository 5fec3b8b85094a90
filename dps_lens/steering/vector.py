"""Steering vectors: a direction in the residual stream, added while the answer is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.data import Example, PromptConfig, User, build_prompt
from dps_lens.data.tokenizer import PromptTokenizer, without_special
from dps_lens.errors import HeadError, SteeringError
from dps_lens.model import HookedModel, Runner, native_attention


@dataclass(frozen=True)
class SteeringVector:
    """A direction that `generate(rule="vector", vectors=…)` adds, times γ.

    Attributes:
        values: `Float[Tensor, "d_model"]`.
        layer: it is added to the residual stream that leaves this layer, from the last prompt token on.
        label: what the vector is called.
        manifest: how it was made.
    """

    values: Float[Tensor, " d_model"]
    layer: int
    label: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)

    def check(self, call: str, model: HookedModel) -> None:
        """Refuse a model that this is not a direction of.

        Raises:
            SteeringError: its layer or width is another; names the call.
        """
        if not 0 <= self.layer < model.cfg.n_layers or self.values.shape != (model.cfg.d_model,):
            raise SteeringError(
                f"{call}: a vector {list(self.values.shape)} at layer {self.layer} is not of this model, "
                f"[{model.cfg.d_model}] in {model.cfg.n_layers} layers"
            )


def style_vector(
    model: HookedModel,
    user: User,
    *,
    layer: int | None = None,
    generic: Mapping[str, str] | None = None,
    max_examples: int | None = None,
    prompt: PromptConfig | None = None,
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
        prompt: how prompts are built.
        max_new_tokens: length of a generic answer; by default what the task needs, and no more than `response_tokens`
            of the prompt's configuration, at which the user's own texts are cut.

    Raises:
        HeadError: the layer is not in the model.
        SteeringError: the user has no discovery example, or `generic` lacks one.
    """
    at, chosen = layer_and_examples("style_vector", model, user, layer, max_examples)
    differences = style_differences(model, chosen, generic=generic, prompt=prompt, max_new_tokens=max_new_tokens)
    return SteeringVector(
        differences[:, at].mean(0), at, "style", {"user": user.id, "examples": [example.id for example in chosen]}
    )


def layer_and_examples(
    call: str, model: HookedModel, user: User, layer: int | None, max_examples: int | None
) -> tuple[int, tuple[Example, ...]]:
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
    return at, examples[-max_examples:] if max_examples else examples


@torch.no_grad()
def style_differences(
    model: HookedModel,
    examples: Sequence[Example],
    *,
    generic: Mapping[str, str] | None = None,
    prompt: PromptConfig | None = None,
    max_new_tokens: int | None = None,
) -> Float[Tensor, "example layer d_model"]:
    """One example a row of what the style vector is the mean of, at every layer; arguments as in `style_vector`."""
    tokenizer = PromptTokenizer(model)
    config = prompt or PromptConfig()
    found = []
    for example in examples:
        built = build_prompt(model, example, "none", config=config)
        if generic is None:
            longest = min(example.task.max_new_tokens, config.response_tokens or example.task.max_new_tokens)
            answer = _own_answer(model, built, max_new_tokens or longest)
        elif example.id in generic:
            answer = torch.tensor(tokenizer.answer(generic[example.id], config.response_tokens), dtype=torch.long)
        else:
            raise SteeringError(f"style_vector: generic= holds no answer to example {example.id!r}")
        generic_end = last_residuals(model, torch.cat([built.prompt_tokens, answer]))
        found.append(last_residuals(model, built.tokens) - generic_end)
    return torch.stack(found)


def _own_answer(model: HookedModel, prompt: Any, max_new_tokens: int) -> Int[Tensor, " pos"]:
    from dps_lens.steering.generate import generate

    written: Any = generate(model, prompt, heads={}, gamma=0.0, max_new_tokens=max_new_tokens)
    return without_special(model, written.tokens[0])


def last_residuals(model: HookedModel, tokens: Int[Tensor, " pos"]) -> Float[Tensor, "layer d_model"]:
    """The residual stream that leaves every layer, at the last token, as float32 on the CPU."""
    return logits_and_residuals(model, tokens, 1)[1][:, 0]


def logits_and_residuals(
    model: HookedModel, tokens: Int[Tensor, " pos"], last: int
) -> tuple[Float[Tensor, "last d_vocab"], Float[Tensor, "layer last d_model"]]:
    """Logits of the last positions, and the residual stream that leaves every layer there, as float32 on the CPU."""
    found: dict[int, Tensor] = {}

    def keep(residual: Tensor, hook: Any, layer: int) -> None:
        found[layer] = residual[0, -last:].detach().float().cpu()

    runner, n_layers = Runner.of(model), model.cfg.n_layers
    hooks = [(f"blocks.{layer}.hook_resid_post", partial(keep, layer=layer)) for layer in range(n_layers)]
    with native_attention(model), model.hooks(fwd_hooks=hooks):
        logits = runner.logits(tokens[None].to(runner.device), keep=last)[0]
    return logits, torch.stack([found[layer] for layer in range(n_layers)])
