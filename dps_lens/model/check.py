"""Prove on a loaded model what scoring and steering rely on."""

from typing import Any
from warnings import warn

import torch
from torch import Tensor

from dps_lens.errors import ModelCheckError
from dps_lens.model.attention import native_attention
from dps_lens.model.hooked_attention import check_attention_reads, check_attention_writes
from dps_lens.model.positions import rotary_switch
from dps_lens.model.protocol import HookedModel, hf_model_of, is_bridge
from dps_lens.model.runner import Residuals, Runner
from dps_lens.model.runners import runner_of

_PROBE_LENGTH = 16
_SHORTER = 5


@torch.inference_mode()
def check_model(model: HookedModel, *, reference: Any = None) -> dict[str, float]:
    """Check what scoring and steering do with a model, on a few tokens.

    | check | what is compared |
    |---|---|
    | `ablation` | a head zeroed at `hook_z`, and the columns of the output projection that read it zeroed |
    | `prompt` | tokens after cached keys and values of a prompt, and one whole pass |
    | `long prompt` | the same beyond the length at which rotary factors change, where a model has one |
    | `restart` | rows that join in the middle of the model, and one whole pass |
    | `padding` | left-padded rows of unequal lengths, decoded step by step, and each row alone |
    | `native attention` | the model's own attention kernel, and the one that TransformerLens recomputes |
    | `parity` | the model, and plain Hugging Face |

    A warning says where attention cannot be read or edited on this architecture (`ablation="uniform"`, attention
    patterns, induction and retrieval heads); these calls then raise `ModelCheckError`, and everything else works.

    Args:
        model: a hooked model.
        reference: the plain Hugging Face model to compare logits with. For a `TransformerBridge` it is
            rebuilt from the bridge when not given, unless weights are offloaded; for a `HookedTransformer`
            parity is checked only against a reference that is given.

    Returns:
        the largest deviation of logits that each check found; `native attention` is left out where that one cannot be
        read.

    Raises:
        ModelCheckError: says which check failed, where, and by how much.
    """
    _check_finite(model)
    runner = runner_of(model)
    tokens = torch.arange(_PROBE_LENGTH, device=runner.device)[None] * 7 % min(model.cfg.d_vocab, 1000)
    with native_attention(model):
        _check_shapes(model, tokens)
        logits = runner.logits(tokens)
        scale = float(logits.float().abs().max())
        tolerance = scale * (1e-4 if logits.dtype == torch.float32 else 5e-2)
        found = {
            "ablation": _check_ablation(model, runner, tokens, tolerance),
            **_check_restarts(runner, tokens, logits, tolerance),
            **_check_long(runner, tolerance),
            "padding": _check_padding(runner, tokens, tolerance),
        }
    try:
        check_attention_reads("check_model", model)
        found["native attention"] = _compare(
            "native against hooked attention", runner.logits(tokens), logits, tolerance
        )
        check_attention_writes("check_model", model)
    except ModelCheckError as error:
        warn(str(error), stacklevel=2)
    reference = reference if reference is not None else _plain_model(model)
    if reference is not None:
        plain = reference(input_ids=tokens).logits
        found["parity"] = _compare("parity with the plain Hugging Face model", logits, plain, tolerance)
    return found


def _check_restarts(runner: Runner, tokens: Tensor, logits: Tensor, tolerance: float) -> dict[str, float]:
    """Tokens after a cached prompt, and rows that join them at the first, a middle and the last layer."""
    n_layers, half = runner.cfg.n_layers, tokens.shape[1] // 2
    residuals: Residuals = dict.fromkeys(sorted({0, n_layers // 2, n_layers - 1}))
    prompt, rest = runner.prefill(tokens[:, :half]), tokens[:, half:]
    continued = runner.logits(rest, prompt=prompt, record=residuals)
    starts = {layer: residual.expand(2, -1, -1) for layer, residual in sorted(residuals.items())}
    joined = runner.resume(starts, rest, prompt=prompt)
    expected = logits[:, half:]
    return {
        "prompt": _compare("tokens after a cached prompt", continued, expected, tolerance),
        "restart": _compare("rows that join in the middle of the model", joined, expected, tolerance),
    }


def _check_long(runner: Runner, tolerance: float) -> dict[str, float]:
    switch = rotary_switch(runner.model)
    if switch is None or not switch.settles or switch.limit + _PROBE_LENGTH > runner.cfg.n_ctx:
        return {}
    tokens = torch.arange(switch.limit + _PROBE_LENGTH, device=runner.device)[None] * 7 % min(runner.cfg.d_vocab, 1000)
    begin = switch.limit + _PROBE_LENGTH // 2
    whole = runner.logits(tokens, keep=tokens.shape[1] - begin)
    continued = runner.logits(tokens[:, begin:], prompt=runner.prefill(tokens[:, :begin]))
    return {"long prompt": _compare("tokens after a long cached prompt", continued, whole, tolerance)}


def _check_padding(runner: Runner, tokens: Tensor, tolerance: float) -> float:
    """Two rows of unequal lengths: one step after their prompts, and another."""
    length, gap = tokens.shape[1] - 1, tokens.shape[1] - _SHORTER
    rows = tokens.repeat(2, 1)
    mask = torch.ones_like(rows)
    mask[1, :gap] = 0
    cache = runner.start_decoding(
        runner.prefill(rows[:, : length - 1], mask[:, : length - 1]), torch.arange(2, device=rows.device)
    )
    worst = 0.0
    for stop in (length, length + 1):
        stepped = runner.step(rows[:, stop - 1 : stop], cache, mask[:, :stop])
        for row, begin in enumerate((0, gap)):
            alone = runner.logits(tokens[:, begin:stop], keep=1)[0]
            worst = max(worst, _compare("left-padded rows of a batch", stepped[row : row + 1], alone, tolerance))
    return worst


def _check_finite(model: HookedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
            raise ModelCheckError(f"check_model: weights hold NaN or infinity in {name}; load the model again")


def _check_shapes(model: HookedModel, tokens: Tensor) -> None:
    cfg, shapes = model.cfg, {}
    hooks = [
        (_hook_z(layer), lambda z, hook: shapes.update({hook.name: tuple(z.shape)})) for layer in range(cfg.n_layers)
    ]
    absent = [layer for layer in range(cfg.n_layers) if _hook_z(layer) not in model.hook_dict]
    if absent:
        raise ModelCheckError(
            f"check_model: {_architecture(model)} has no {_hook_z(absent[0])}; layers without attention heads cannot "
            "be scored or steered"
        )
    names = {layer: model.hook_dict[_hook_z(layer)].name for layer in range(cfg.n_layers)}
    with model.hooks(fwd_hooks=hooks):
        runner_of(model).logits(tokens, keep=1)
    expected = (*tokens.shape, cfg.n_heads, cfg.d_head)
    for layer, name in names.items():
        if shapes.get(name) != expected:
            raise ModelCheckError(
                f"check_model: {_hook_z(layer)} of {_architecture(model)} gave {shapes.get(name, 'nothing')}, expected "
                f"[batch pos head d_head] = {expected}; its heads have no output of one size that can be ablated"
            )


def _check_ablation(model: HookedModel, runner: Runner, tokens: Tensor, tolerance: float) -> float:
    """Zeroing a head at hook_z against zeroing its columns in the output projection, one head a layer."""
    worst = 0.0
    for layer in range(model.cfg.n_layers):
        head = layer % model.cfg.n_heads

        def zero(z: Tensor, hook: object, head: int = head) -> Tensor:
            z = z.clone()
            z[:, :, head] = 0
            return z

        with model.hooks(fwd_hooks=[(_hook_z(layer), zero)]):
            hooked = runner.logits(tokens)
        projection = _ColumnsZeroed(model, layer, head)
        if projection.weights.device.type == "meta":
            continue  # the weights wait on a disk and cannot be edited
        with projection:
            zeroed = runner.logits(tokens)
        worst = max(worst, _compare(f"zeroing L{layer}H{head} at hook_z", hooked, zeroed, tolerance))
    return worst


class _ColumnsZeroed:
    """The output projection without the weights that read one head."""

    def __init__(self, model: HookedModel, layer: int, head: int) -> None:
        attn, d_head = model.blocks[layer].attn, model.cfg.d_head
        if is_bridge(model):
            module = attn.o.original_component
            columns = slice(head * d_head, (head + 1) * d_head)
            # torch.nn.Linear keeps [out, in], the Conv1D of GPT-2 [in, out].
            self.weights = module.weight[:, columns] if isinstance(module, torch.nn.Linear) else module.weight[columns]
        else:
            self.weights = attn.W_O[head]

    def __enter__(self) -> None:
        self.saved = self.weights.clone()
        self.weights.zero_()

    def __exit__(self, *exception: object) -> None:
        self.weights.copy_(self.saved)


def _plain_model(model: HookedModel) -> Any:
    """The unhooked model with the same weights, or None where it cannot be put together."""
    if not is_bridge(model):
        return None
    hooked = hf_model_of(model)
    weights = {
        name.replace("._original_component", ""): value for name, value in torch.nn.Module.state_dict(hooked).items()
    }
    if any(value.device.type == "meta" for value in weights.values()):
        return None
    config = type(hooked.config).from_dict(hooked.config.to_dict())
    plain = type(hooked)._from_config(config, dtype=hooked.dtype).to(hooked.device)
    # The weights are shared, not copied.
    missing = plain.load_state_dict(weights, strict=False, assign=True).missing_keys
    return plain.eval() if not missing else None


def _architecture(model: HookedModel) -> str:
    return type(hf_model_of(model)).__name__ if is_bridge(model) else str(model.cfg.model_name)


def _compare(what: str, got: Tensor, expected: Tensor, tolerance: float) -> float:
    error = float((got.float() - expected.float()).abs().max())
    if not error <= tolerance:
        raise ModelCheckError(f"check_model: {what}: logits differ by {error:.3g}, more than {tolerance:.3g}")
    return error


def _hook_z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"
