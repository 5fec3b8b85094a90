"""Steering vectors for other programs: a control vector of llama.cpp, or an adapter with a bias."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dps_lens.adapters.lora import check_exportable, projections_of, write_adapter
from dps_lens.checks import check_number
from dps_lens.errors import SteeringError
from dps_lens.files import replacing
from dps_lens.model import HookedModel, Hooks, hf_model_of, runner_of
from dps_lens.steering.vector import HeadVector, Vector

VectorFormat: TypeAlias = Literal["gguf", "lora"]

_PROBE, _LONG = 24, 10.0
_SAME, _ROUGHLY_SAME = 1e-3, 0.05


def export_vector(
    model: HookedModel, vector: Vector, path: str | Path, *, format: VectorFormat = "gguf", gamma: float = 1.0
) -> Path:
    """Write γ times a vector for programs that know nothing of hooks.

    What is written acts at *every* position, the prompt's too, and equals a hook that adds it there;
    `generate(rule="head_vector")` adds from the last prompt token on. For other uses, `vector.save(folder)` keeps the
    vector as safetensors with a manifest.

    `"gguf"` is a control vector, as llama.cpp (`--control-vector`) and repeng read it: `direction.L` is added to what
    leaves layer L ≥ 1. It holds residual vectors, and vectors of heads where attention and MLP of a layer read the same
    residual stream (GPT-NeoX, GPT-J, Phi, …). `"lora"` is a PEFT adapter whose matrices are 0 and whose bias
    (`lora_bias`) is `γ Σ_h values[h] W_O[h]`, on the attention output projection of each layer. It holds vectors of
    heads.

    Args:
        model: a `TransformerBridge`.
        vector: such as `head_vectors(…)[user]`, or `style_vector(…)`.
        path: a file for `gguf`, a folder for `lora`.
        format: see above.
        gamma: strength.

    Returns:
        the path.

    Raises:
        SteeringError: the format does not add where the vector does, which is tried on this model; the vector is of
            another one; or the folder holds another adapter.
    """
    if format not in ("gguf", "lora"):
        raise SteeringError(f"export_vector: format {format!r} is unknown; use 'gguf' or 'lora'")
    check_number(SteeringError, "export_vector: gamma", gamma)
    vector.check("export_vector", model)
    check_exportable("export_vector", model)
    if format == "lora":
        return _as_adapter(model, vector, Path(path), gamma)
    return _as_control_vector(model, vector, Path(path), gamma)


def _as_adapter(model: HookedModel, vector: Vector, path: Path, gamma: float) -> Path:
    if not isinstance(vector, HeadVector):
        raise SteeringError(
            "export_vector: an adapter adds to the attention output, and this vector to what leaves a layer; use 'gguf'"
        )
    residuals = vector.residuals(model)
    projections = projections_of("export_vector", model, sorted(residuals))
    tensors: dict[str, Tensor] = {}
    for one in projections:
        name = f"base_model.model.{one.name}"
        tensors[f"{name}.lora_A.weight"] = torch.zeros(1, one.weight.shape[1], dtype=one.weight.dtype)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(len(one.weight), 1, dtype=one.weight.dtype)
        tensors[f"{name}.lora_B.bias"] = (gamma * residuals[one.layer]).to(one.weight.dtype)
    about = {"heads": str(vector.heads), "gamma": str(gamma)}
    return write_adapter("export_vector", model, path, tensors, projections, rank=1, bias=True, about=about)


def _as_control_vector(model: HookedModel, vector: Vector, path: Path, gamma: float) -> Path:
    import gguf

    directions = {layer: gamma * row for layer, row in vector.residuals(model).items()}
    if 0 in directions:
        raise SteeringError("export_vector: a control vector cannot add to what leaves layer 0; leave its heads out")
    if isinstance(vector, HeadVector) and not _same(model, vector):
        raise SteeringError(
            "export_vector: in this model the MLP of a layer reads what its heads wrote, and a control vector is added "
            "behind both; use format='lora'"
        )
    with replacing(path) as new:
        writer = gguf.GGUFWriter(str(new), "controlvector")
        writer.add_string("controlvector.model_hint", str(hf_model_of(model).config.model_type))
        writer.add_uint32("controlvector.layer_count", len(directions))
        for layer, direction in sorted(directions.items()):
            writer.add_tensor(f"direction.{layer}", direction.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


@torch.inference_mode()
def _same(model: HookedModel, vector: HeadVector) -> bool:
    """Whether adding at heads, and to what leaves their layers, do the same to the logits of a few tokens.

    It depends on the model, not on how long the vector is: a long one shows it, also in a rough number format.
    """
    runner = runner_of(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.cfg.d_vocab, (1, _PROBE), generator=generator).to(runner.device)
    long = vector / max(float(vector.values.norm(dim=1).max()), 1e-30) * _LONG

    def logits(added: Mapping[str, Tensor]) -> Tensor:
        def add(activation: Tensor, hook: object, values: Tensor) -> Tensor:
            return activation + values.to(activation)

        hooks = [(name, partial(add, values=values)) for name, values in added.items()]
        with Hooks(model, hooks):
            return runner.logits(tokens).float()

    directions = {f"blocks.{layer}.hook_resid_post": row for layer, row in long.residuals(model).items()}
    ours, theirs, plain = logits(long.additions(1.0)), logits(directions), logits({})
    tolerance = _SAME if next(model.parameters()).dtype == torch.float32 else _ROUGHLY_SAME
    return bool((ours - theirs).abs().amax() <= tolerance * (ours - plain).abs().amax())
