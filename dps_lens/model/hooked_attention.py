"""Whether the attention that TransformerLens recomputes is the model's own, and obeys what is written into it.

`hook_attn_scores` and `hook_pattern` fire in the recomputed attention only. Some adapters of the bridge leave a part
of the model out there (ALiBi), and others fire the hooks beside the attention that counts, so that what is written is
lost. Neither shows in the logits of a model that is only read.
"""

from functools import partial

import torch
from torch import Tensor

from dps_lens.errors import ModelCheckError
from dps_lens.model.kernels import native_kernels
from dps_lens.model.protocol import HookedModel, is_bridge
from dps_lens.model.runner import Runner
from dps_lens.model.runners import runner_of
from dps_lens.model.trials import tried

_TOKENS = 5
_CURE = "use 'zero', 'mean' or 'patch', which edit hook_z"


def check_attention_reads(call: str, model: HookedModel) -> None:
    """Refuse to read attention patterns that are not the model's.

    Raises:
        ModelCheckError: the recomputed attention gives other logits than the model's own.
    """
    if not tried(model, "attention reads", partial(_reads, model)):
        raise ModelCheckError(
            f"{call}: for this architecture transformer-lens recomputes no attention, or one that gives other logits "
            f"than the model's own, so its patterns mean nothing; {_CURE}"
        )


def check_attention_writes(call: str, model: HookedModel) -> None:
    """Refuse edits of attention scores that the model does not obey.

    Raises:
        ModelCheckError: z does not become the mean of v where scores are made equal.
    """
    check_attention_reads(call, model)
    if not tried(model, "attention writes", partial(_writes, model)):
        raise ModelCheckError(
            f"{call}: for this architecture z does not follow what is written at hook_attn_scores, so attention cannot "
            f"be spread evenly; {_CURE}"
        )


def _reads(model: HookedModel) -> bool:
    runner, shapes = runner_of(model), {}
    tokens = _probe(runner)

    def note(pattern: Tensor, hook: object, layer: int) -> None:
        shapes[layer] = tuple(pattern.shape)

    layers = range(model.cfg.n_layers)
    hooks = [(f"blocks.{layer}.attn.hook_pattern", partial(note, layer=layer)) for layer in layers]
    with model.hooks(fwd_hooks=hooks):
        hooked = runner.logits(tokens).float()
    if shapes != dict.fromkeys(layers, (1, model.cfg.n_heads, _TOKENS, _TOKENS)):
        return False
    if not is_bridge(model):
        return True
    with native_kernels(model):
        native = runner.logits(tokens).float()
    exact = next(model.parameters()).dtype == torch.float32
    return bool((hooked - native).norm() <= (1e-4 if exact else 0.05) * native.norm())


def _writes(model: HookedModel) -> bool:
    runner, last = runner_of(model), model.cfg.n_layers - 1
    return all(_obeys(runner, layer) for layer in sorted({0, last // 2, last}))


def _obeys(runner: Runner, layer: int) -> bool:
    """Equal scores must give the mean of what single positions give, and that must not be what the model gives."""
    clean, even = (_z(runner, layer, position) for position in (_CLEAN, None))
    singles = [_z(runner, layer, position) for position in range(_TOKENS)]
    expected = torch.stack([torch.stack([z[query] for z in singles[: query + 1]]).mean(0) for query in range(_TOKENS)])
    exact = next(runner.model.parameters()).dtype == torch.float32
    effect = (even - clean).norm()
    return bool(effect > 0) and bool((even - expected).norm() <= (1e-3 if exact else 0.2) * effect)


_CLEAN = -1


def _z(runner: Runner, layer: int, position: int | None) -> Tensor:
    """z of a layer, `[query head d_head]`, where all heads look at one position, evenly (None), or as they would."""
    kept: list[Tensor] = []

    def write(scores: Tensor, hook: object) -> Tensor:
        lowest = torch.finfo(scores.dtype).min
        seen = scores > lowest / 2
        if position == _CLEAN:
            return scores
        if position is None:
            return scores.masked_fill(seen, 0)
        only = torch.full_like(scores, lowest)
        only[..., position] = 0
        # Queries before the position do not see it.
        return torch.where(seen[..., position, None], only, scores)

    def keep(z: Tensor, hook: object) -> None:
        kept.append(z[0].float())

    name = f"blocks.{layer}.attn."
    with runner.model.hooks(fwd_hooks=[(name + "hook_attn_scores", write), (name + "hook_z", keep)]):
        runner.logits(_probe(runner), keep=1)
    return kept[0]


def _probe(runner: Runner) -> Tensor:
    return (torch.arange(2, 2 + _TOKENS, device=runner.device)[None] * 7) % runner.cfg.d_vocab
