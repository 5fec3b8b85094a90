"""The masked model as a LoRA adapter on the attention output projections."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dps_lens.errors import SteeringError
from dps_lens.files import as_json, replacing, write_tensors
from dps_lens.heads import HeadSet
from dps_lens.intervene import AblationLike, Mean, Zero, find_ablation
from dps_lens.model import HookedModel, hf_model_of, is_bridge, loader_of

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def export_lora(
    model: HookedModel, heads: HeadSet, path: str | Path, *, ablation: AblationLike = "zero", max_rank: int = 256
) -> Path:
    """Write a head mask as a PEFT LoRA adapter, for a server that runs the masked branch of DPS.

    Equals `ablate(model, heads, ablation=…, positions="all")` up to rounding: ΔW = −W_O on the columns that
    read the heads. A (rank × in) picks these columns, B (out × rank) = −W_O[:, columns]; the bias stays. A mean
    ablation adds a bias to B, `W_O[:, columns]` times the mean (`lora_bias`, which not every server knows).
    The rank is d_head × the most heads in one layer; layers with fewer are filled with zeros, because
    not every server knows a rank for each layer. Scaling is 1. It is an adapter of the weights that the model has: of
    a model that was itself loaded from an adapter, the base is that adapter, which `load_model` merges first.

    Args:
        model: a `TransformerBridge` with the weights of its Hugging Face model.
        heads: the heads to mask.
        ablation: `"zero"` or `Mean(z=…)`.
        path: a folder; `adapter_config.json` and `adapter_model.safetensors` are written into it, over those of an
            earlier call.
        max_rank: the largest rank that the server takes.

    Returns:
        the folder.

    Raises:
        SteeringError: the mask cannot be written as a LoRA adapter of this model, or the folder holds another adapter.
        HeadError: a head is outside the model.
    """
    check_exportable("export_lora", model)
    replaced = find_ablation(ablation)
    if not isinstance(replaced, (Zero, Mean)):
        raise SteeringError(
            f"export_lora: an adapter puts a constant in the place of z, which {replaced.name!r} is not; use 'zero' or "
            "Mean(z=…)"
        )
    mean = replaced.standalone("export_lora")
    if not len(heads):
        raise SteeringError("export_lora: the head set is empty; an adapter needs at least one head")
    mask, d_head = heads.mask(model.cfg), int(model.cfg.d_head)
    layer, most = Counter(head.layer for head in heads).most_common(1)[0]
    rank = d_head * most
    if rank > max_rank:
        raise SteeringError(
            f"export_lora: rank {rank} = d_head {d_head} × {most} heads in layer {layer} is above max_rank {max_rank}; "
            f"keep at most {max_rank // d_head} heads in a layer, or raise max_rank to what the server takes"
        )
    tensors: dict[str, Tensor] = {}
    projections = projections_of("export_lora", model, mask.any(dim=1).nonzero().flatten().tolist())
    for one in projections:
        weight, columns = one.weight, mask[one.layer].repeat_interleave(d_head).nonzero().flatten()
        a, b = (torch.zeros(shape, dtype=weight.dtype) for shape in ((rank, weight.shape[1]), (len(weight), rank)))
        a[torch.arange(len(columns)), columns] = 1
        b[:, : len(columns)] = -weight[:, columns.to(weight.device)].cpu()
        name = f"base_model.model.{one.name}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        if mean is not None:
            constant = mean[one.layer].flatten()[columns].to(weight)
            tensors[f"{name}.lora_B.bias"] = (weight[:, columns.to(weight.device)] @ constant).cpu()
    return write_adapter(
        "export_lora", model, path, tensors, projections, rank=rank, bias=mean is not None, about={"heads": str(heads)}
    )


class Projection(NamedTuple):
    """The attention output projection of a layer.

    Attributes:
        layer: its layer.
        name: of its module in the model of Hugging Face.
        weight: `[d_model d_z]`.
        transposed: it is GPT-2's Conv1D.
    """

    layer: int
    name: str
    weight: Float[Tensor, "d_model d_z"]
    transposed: bool


def check_exportable(call: str, model: HookedModel) -> None:
    """Refuse a model whose weights are not those of its Hugging Face model.

    Raises:
        SteeringError: names the call.
    """
    if not is_bridge(model):
        raise SteeringError(
            f"{call}: a HookedTransformer does not hold the modules of Hugging Face that an adapter names; "
            "load the model with transformer-lens>=4"
        )
    if getattr(model, "_weights_processed", False):
        raise SteeringError(
            f"{call}: enable_compatibility_mode() has changed the weights; load the model again without it"
        )


def projections_of(call: str, model: HookedModel, layers: Sequence[int]) -> list[Projection]:
    """The attention output projections of some layers.

    Raises:
        SteeringError: one cannot be named, or its weights cannot be read; names the call.
    """
    names = {id(module): name for name, module in plain_modules(hf_model_of(model))}
    found = []
    for layer in layers:
        projection = model.blocks[layer].attn.o.original_component
        weight, name = _weight(call, model, projection, layer), names.get(id(projection))
        if name is None:
            raise SteeringError(
                f"{call}: the output projection of layer {layer} is made by the bridge and is no module of "
                f"{type(hf_model_of(model)).__name__}, so an adapter cannot name it"
            )
        found.append(Projection(layer, name, weight, not isinstance(projection, torch.nn.Linear)))
    return found


def write_adapter(
    call: str,
    model: HookedModel,
    path: str | Path,
    tensors: Mapping[str, Tensor],
    projections: Sequence[Projection],
    *,
    rank: int,
    bias: bool,
    about: Mapping[str, str],
) -> Path:
    """A PEFT adapter in a folder, over an earlier one of ours.

    Raises:
        SteeringError: the folder holds an adapter of another origin.
    """
    path = Path(path)
    _check_folder(call, path)
    config = _config(
        model,
        rank,
        [one.name for one in projections],
        fan_in_fan_out=any(one.transposed for one in projections),
        bias=bias,
    )
    # Both are written before either takes its place: a disk that fills up leaves the former adapter whole.
    with replacing(path / "adapter_config.json") as new:
        new.write_text(as_json(config), encoding="utf-8")
        write_tensors(path / "adapter_model.safetensors", dict(tensors), {"format": "pt", **about})
    return path


def _check_folder(call: str, path: Path) -> None:
    """Refuse to write over an adapter that this call did not write."""
    weights = path / "adapter_model.safetensors"
    if not weights.exists() and not (path / "adapter_config.json").exists():
        return
    try:
        with safe_open(weights, framework="pt") as file:
            own = "heads" in (file.metadata() or {})
    except (SafetensorError, OSError):
        own = False
    if not own:
        raise SteeringError(f"{call}: {path} holds an adapter of another origin; use another folder")


def _config(model: HookedModel, rank: int, targets: list[str], *, fan_in_fan_out: bool, bias: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hf_model_of(model).name_or_path,
        "revision": _revision(model),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_bias": bias,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _revision(model: HookedModel) -> str | None:
    """The one that the model was loaded with."""
    loader = loader_of(model)
    return None if loader is None else loader.keywords["revision"]


def _weight(call: str, model: HookedModel, projection: Any, layer: int) -> Float[Tensor, "d_model d_z"]:
    """W_O of a layer as `[out, in]`, of a linear layer or of GPT-2's transposed Conv1D."""
    from transformers.pytorch_utils import Conv1D

    if getattr(hf_model_of(model), "hf_quantizer", None) is not None or projection.weight.dtype not in _FLOATS:
        raise SteeringError(
            f"{call}: the output projection of layer {layer} is a {type(projection).__name__} of quantised "
            "weights; export from the unquantised model"
        )
    if not isinstance(projection, (torch.nn.Linear, Conv1D)) or hasattr(projection, "base_layer"):
        raise SteeringError(
            f"{call}: the output projection of layer {layer} is a {type(projection).__name__} of "
            f"{type(projection).__module__}, no plain linear layer; merge what was put around it into the weights "
            "(load_model does, given the folder of a PEFT adapter)"
        )
    weight = projection.weight.detach()
    if weight.device.type == "meta":
        raise SteeringError(f"{call}: the weights of layer {layer} are offloaded; load the model without offloading")
    if not isinstance(projection, torch.nn.Linear):
        weight = weight.T
    if weight.shape[1] != model.cfg.n_heads * model.cfg.d_head:
        raise SteeringError(
            f"{call}: the output projection of layer {layer} reads {weight.shape[1]} inputs, not "
            f"{model.cfg.n_heads} heads × {model.cfg.d_head}; this architecture's heads have no columns of their own"
        )
    return weight


def plain_modules(module: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Modules under the names they have without the bridge, whose wrappers stand where the modules stood."""
    wrapped = module._modules.get("_original_component")
    if wrapped is not None:
        yield from plain_modules(wrapped, name)
        return
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            yield from plain_modules(child, f"{name}.{child_name}" if name else child_name)
