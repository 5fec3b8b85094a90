"""Prove on a loaded model what scoring and steering rely on."""

from typing import Any

import torch
from torch import Tensor

from dps_lens.errors import ModelCheckError
from dps_lens.model.attention import native_attention
from dps_lens.model.protocol import HookedModel, hf_model_of, is_bridge
from dps_lens.model.runner import Residuals, Runner
from dps_lens.model.runners import runner_of

_PROBE_LENGTH = 16


@torch.inference_mode()
def check_model(model: HookedModel, *, reference: Any = None) -> dict[str, float]:
    """Check weights, hook_z, head ablation, restarts and parity with Hugging Face.

    Args:
        model: a hooked model.
        reference: the plain Hugging Face model to compare logits with. For a `TransformerBridge` it is
            rebuilt from the bridge when not given, unless weights are offloaded; for a `HookedTransformer`
            parity is checked only against a reference that is given.

    Returns:
        the largest deviation of logits found by each check that compares logits.

    Raises:
        ModelCheckError: says which check failed, where, and by how much.
    """
    _check_finite(model)
    runner = runner_of(model)
    tokens = torch.arange(_PROBE_LENGTH, device=runner.device)[None] * 7 % min(model.cfg.d_vocab, 1000)
    residuals: Residuals = dict.fromkeys(range(model.cfg.n_layers))
    with native_attention(model):
        _check_shapes(model, tokens)
        logits = runner.logits(tokens, record=residuals)
        scale = float(logits.float().abs().max())
        tolerance = scale * (1e-4 if logits.dtype == torch.float32 else 5e-2)
        found = {"ablation": _check_ablation(model, runner, tokens, tolerance)}
        middle = model.cfg.n_layers // 2
        restarted = runner.resume({middle: residuals[middle]}, tokens)
        found["restart"] = _compare("restart in the middle of the model", restarted, logits, tolerance)
    found["native attention"] = _compare("native against hooked attention", runner.logits(tokens), logits, tolerance)
    reference = reference if reference is not None else _plain_model(model)
    if reference is not None:
        plain = reference(input_ids=tokens).logits
        found["parity"] = _compare("parity with the plain Hugging Face model", logits, plain, tolerance)
    return found


def _check_finite(model: HookedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
            raise ModelCheckError(f"check_model: weights hold NaN or infinity in {name}; load the model again")


def _check_shapes(model: HookedModel, tokens: Tensor) -> None:
    cfg, shapes = model.cfg, {}
    hooks = [
        (_hook_z(layer), lambda z, hook: shapes.update({hook.name: tuple(z.shape)})) for layer in range(cfg.n_layers)
    ]
    names = {layer: model.hook_dict[_hook_z(layer)].name for layer in range(cfg.n_layers)}
    with model.hooks(fwd_hooks=hooks):
        runner_of(model).logits(tokens, keep=1)
    expected = (*tokens.shape, cfg.n_heads, cfg.d_head)
    for layer, name in names.items():
        if shapes.get(name) != expected:
            raise ModelCheckError(
                f"check_model: {_hook_z(layer)} gave {shapes.get(name, 'nothing')}, expected [batch pos head d_head] = "
                f"{expected}; this architecture has no per-head output that can be ablated"
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


def _compare(what: str, got: Tensor, expected: Tensor, tolerance: float) -> float:
    error = float((got.float() - expected.float()).abs().max())
    if not error <= tolerance:
        raise ModelCheckError(f"check_model: {what}: logits differ by {error:.3g}, more than {tolerance:.3g}")
    return error


def _hook_z(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_z"
