"""DPS inside `generate` of transformers, in one file that needs no other package: `custom_generate/generate.py`.

    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, gamma=1.0)

writes by `(1 + gamma) · log p − gamma · log p without the heads`, from the last prompt token on (arXiv 2604.22345).
Sampling, penalties and stopping are those of `generate`, and act on this distribution. gamma 0 is the model's own
text. The prompt is run twice, and every token in two passes. Not with beams, assisted decoding or prompt lookup.
"""

import inspect
from typing import Any

import torch
from transformers import DynamicCache, GenerationMixin

WIDTH = 0
"""Numbers that a head hands over."""

HEADS: dict[str, list[int]] = {}
"""Heads that the masked pass does without, by the name of the module that reads what they hand over."""

GAMMA = 1.0
"""Strength, where the call gives none."""


def generate(model: Any, *args: Any, gamma: float | None = None, **kwargs: Any) -> Any:
    """What transformers calls in place of its own `generate`; takes its arguments, and `gamma`, at least -1."""
    strength = GAMMA if gamma is None else float(gamma)
    if not -1 <= strength < float("inf"):
        raise ValueError(f"gamma {strength} is not a number from -1 on")
    config = kwargs.get("generation_config") or model.generation_config
    for name in ("num_beams", "prompt_lookup_num_tokens"):
        if (kwargs.get(name) or getattr(config, name, None) or 1) > 1:
            raise ValueError(f"{name}: heads are contrasted in one text at a time; leave it out")
    if kwargs.get("assistant_model") is not None:
        raise ValueError("assistant_model: heads are contrasted token by token; leave it out")
    if strength == 0:
        return GenerationMixin.generate(model, *args, **kwargs)
    steered = _Steered(model, strength)
    model.forward = steered
    try:
        return GenerationMixin.generate(model, *args, **kwargs)
    finally:
        del model.forward


class _Steered:
    """A forward pass whose last logits are contrasted with those of the pass without the heads."""

    def __init__(self, model: Any, gamma: float) -> None:
        self.model, self.gamma, self.forward = model, gamma, model.forward
        self.cache: Any = None
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        # How generate finds out what the model takes.
        self.__signature__ = inspect.signature(model.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        full = self.forward(*args, **kwargs)
        ids = args[0] if args else kwargs["input_ids"]
        if kwargs.get("inputs_embeds") is not None or kwargs.get("use_cache") is False:
            raise ValueError("heads are contrasted with a cache of keys and values, and tokens; leave use_cache on")
        about = {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
        if self.cache is None:
            self.cache = DynamicCache()
            if ids.shape[1] > 1:
                self._run(ids[:, :-1], about, -1)
        with _Masked(self.model):
            less = self._run(ids[:, -1:], about, None)
        log_p, log_less = full.logits[:, -1].float().log_softmax(-1), less.logits[:, -1].float().log_softmax(-1)
        steered = log_less if self.gamma == -1 else (1 + self.gamma) * log_p - self.gamma * log_less
        full.logits = torch.cat([full.logits[:, :-1], steered[:, None].to(full.logits)], dim=1)
        return full

    def _run(self, ids: torch.Tensor, about: dict[str, Any], stop: int | None) -> Any:
        given: dict[str, Any] = {"logits_to_keep": 1} if self.keeps else {}
        if (mask := about["attention_mask"]) is not None:
            given["attention_mask"] = mask[:, :stop]
        if (positions := about["position_ids"]) is not None:
            given["position_ids"] = positions[:, :stop] if stop else positions[:, -1:]
        return self.forward(input_ids=ids, past_key_values=self.cache, use_cache=True, **given)


class _Masked:
    """A context in which what the heads hand over is 0."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, heads in HEADS.items():
            columns = torch.tensor([head * WIDTH + place for head in heads for place in range(WIDTH)])
            module = self.model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(_without(columns)))

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def _without(columns: torch.Tensor) -> Any:
    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept = args[0].clone()
        kept[..., columns.to(kept.device)] = 0
        return (kept, *args[1:])

    return hook
