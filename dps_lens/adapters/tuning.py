"""A LoRA adapter of one user: what training on the user's texts gives, where the others only decode."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.adapters.lora import plain_modules
from dps_lens.data import Example, Prompt, PromptConfig, build_prompt
from dps_lens.errors import SteeringError
from dps_lens.model import BypassedHooks, HookedModel, hf_model_of, is_bridge, native_attention
from dps_lens.model.losses import token_losses

RANK, EPOCHS, LEARNING_RATE, SEED = 8, 3, 5e-4, 0
"""Of `tune_lora`, where nothing else is asked for."""

_ADAPTER = "user"


@dataclass(frozen=True)
class UserLora:
    """A low-rank change of a model's weights, `ΔW = B A`.

    Attributes:
        factors: `NAME.A`, `Float[Tensor, "rank d_in"]`, and `NAME.B`, `Float[Tensor, "d_out rank"]`, by the name of the
            Hugging Face module whose weight is changed.
    """

    factors: Mapping[str, Float[Tensor, "_ _"]]

    @contextmanager
    def on(self, model: HookedModel, strength: float = 1.0) -> Iterator[None]:
        """Add `strength · ΔW` to the model's weights; outside, they are to the bit what they were."""
        from transformers.pytorch_utils import Conv1D

        modules = dict(plain_modules(hf_model_of(model)))
        names = dict.fromkeys(name.rpartition(".")[0] for name in self.factors)
        before = {name: modules[name].weight.detach().clone() for name in names}
        try:
            with torch.no_grad():
                for name in names:
                    weight = modules[name].weight
                    change = strength * (self.factors[f"{name}.B"].to(weight) @ self.factors[f"{name}.A"].to(weight))
                    weight.add_(change.T if isinstance(modules[name], Conv1D) else change)
            yield
        finally:
            with torch.no_grad():
                for name, weight in before.items():
                    modules[name].weight.copy_(weight)


def check_tunable(call: str, model: HookedModel) -> None:
    """Refuse what `tune_lora` cannot train.

    Raises:
        SteeringError: peft is not installed, or the model is a `HookedTransformer`.
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise SteeringError(f"{call}: LoRA is trained by peft; run: pip install peft") from None
    if not is_bridge(model):
        raise SteeringError(f"{call}: LoRA needs the modules of Hugging Face; load the model with transformer-lens>=4")


def tune_lora(
    model: HookedModel,
    examples: Sequence[Example],
    *,
    prompt_config: PromptConfig | None = None,
    rank: int = RANK,
    epochs: int = EPOCHS,
    learning_rate: float = LEARNING_RATE,
    seed: int = SEED,
) -> UserLora:
    """One adapter for one user (arXiv 2402.04401), trained by peft on `task input → what the user wrote`.

    Prompts are without a profile; the loss is the NLL of the response. AdamW, one example a step, in an order that the
    seed shuffles in every epoch. Which projections are changed is peft's choice for the architecture (queries and
    values where they are modules of their own); scaling is 2.

    Args:
        model: a `TransformerBridge`; its weights are the same afterwards.
        examples: what the adapter is trained on.
        prompt_config: how prompts are built.
        rank: of ΔW.
        epochs: passes over the examples.
        learning_rate: of AdamW.
        seed: of the first A (B begins at 0) and of the order.

    Raises:
        SteeringError: no examples, no peft, or no bridge.
    """
    check_tunable("tune_lora", model)
    if not examples:
        raise SteeringError("tune_lora: give at least one example")
    from peft import LoraConfig, LoraModel
    from peft.tuners.lora import LoraLayer

    built = [build_prompt(model, example, "none", config=prompt_config) for example in examples]
    hf_model, order = hf_model_of(model), Random(seed)
    trained = [parameter for parameter in hf_model.parameters() if parameter.requires_grad]
    with native_attention(model), BypassedHooks(model), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        tuner = LoraModel(hf_model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"), _ADAPTER)
        try:
            parameters = [parameter for parameter in hf_model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
            for _ in range(epochs):
                for one in order.sample(built, len(built)):
                    optimizer.zero_grad()
                    _loss(hf_model, one).backward()
                    optimizer.step()
            layers: list[tuple[str, Any]] = [*hf_model.named_modules()]
            factors = {}
            for name, layer in (named for named in layers if isinstance(named[1], LoraLayer)):
                factors[f"{name}.A"] = layer.lora_A[_ADAPTER].weight.detach().cpu().clone()
                factors[f"{name}.B"] = layer.scaling[_ADAPTER] * layer.lora_B[_ADAPTER].weight.detach().cpu()
        finally:
            tuner.unload()
            for parameter in trained:
                parameter.requires_grad_(True)
    return UserLora(factors)


def _loss(hf_model: Any, prompt: Prompt) -> Tensor:
    start, stop = prompt.spans["response"]
    tokens = prompt.tokens.to(hf_model.device)
    logits = hf_model(tokens[None, :-1]).logits[0, start - 1 : stop - 1]
    return token_losses(logits, tokens[start:stop]).mean()
