"""What may be asked of a checkpoint beside its name, device and dtype, and who is asked."""

import difflib
from dataclasses import dataclass, replace
from typing import Any

from dps_lens.errors import ModelLoadError

_HUB = ("cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "subfolder", "token")
_PLACEMENT = ("device_map", "max_memory", "n_devices", "offload_buffers", "offload_folder")
_WEIGHTS = ("quantization_config", "use_safetensors", "variant")
_CONFIG = ("hf_config_overrides", "n_ctx")
_KNOWN = (*_HUB, *_PLACEMENT, *_WEIGHTS, *_CONFIG)
_INSTEAD = {
    "attn_implementation": "the hooks need eager attention, and native_attention runs sdpa where they do not",
    "checkpoint_index": "give the training step as revision=",
    "checkpoint_value": "give the training step as revision=",
    "hf_model": "give the loaded model to dps_lens.model.wrap_model",
    "load_weights": "device='meta' loads none",
    "model_class": "the class follows from the checkpoint's config",
    "tokenizer": "give the loaded model and its tokenizer to dps_lens.model.wrap_model",
    "torch_dtype": "give dtype=",
}
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")


@dataclass(frozen=True)
class Options:
    """Options of `load_model`, by who reads them.

    Args:
        hub: read alike by config, weights and tokenizer.
        placement: where weights lie.
        weights: other options of the weights.
        fields: of the config, set before the weights are read.
        n_ctx: the context length, under whatever name the config has for it.
    """

    hub: dict[str, Any]
    placement: dict[str, Any]
    weights: dict[str, Any]
    fields: dict[str, Any]
    n_ctx: int | None

    @property
    def revision(self) -> str | None:
        return self.hub.get("revision")

    @property
    def trusts(self) -> bool:
        """Whether a checkpoint may bring its own code."""
        return bool(self.hub.get("trust_remote_code"))

    def of_base(self, revision: str | None) -> "Options":
        """Those of an adapter's base model, which has a revision and a layout of its own."""
        hub = {name: value for name, value in self.hub.items() if name not in ("revision", "subfolder")}
        return replace(self, hub=hub | ({} if revision is None else {"revision": revision}))

    def set_fields(self, config: Any) -> None:
        """Write the fields that were asked for into a config.

        Raises:
            ModelLoadError: the config has no such field.
        """
        for name, value in self.fields.items():
            if not hasattr(config, name):
                raise ModelLoadError(
                    f"load_model: hf_config_overrides names {name!r}, which {type(config).__name__} does not have"
                    + _near(name, config.to_dict())
                )
            setattr(config, name, value)
        if self.n_ctx is not None:
            text = config.get_text_config()
            field = next((name for name in _CONTEXT_FIELDS if hasattr(text, name)), None)
            if field is None:
                raise ModelLoadError(f"load_model: {type(text).__name__} has no context length that n_ctx= could set")
            setattr(text, field, self.n_ctx)


def read_options(boot: dict[str, Any], *, device: str | None, revision: str | None, trust_remote_code: bool) -> Options:
    """Sort the options of `load_model`.

    Raises:
        ModelLoadError: an option is unknown, or would be dropped beside the others.
    """
    for name in boot:
        if name not in _KNOWN:
            instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else _near(name, _KNOWN)
            raise ModelLoadError(f"load_model: there is no option {name!r}{instead}")
    given = {name: value for name, value in boot.items() if value is not None}
    placement = {name: given[name] for name in _PLACEMENT if name in given}
    _check_placement(placement, device)
    hub = {name: given[name] for name in _HUB if name in given}
    return Options(
        hub=hub | ({} if revision is None else {"revision": revision}) | {"trust_remote_code": trust_remote_code},
        placement=placement,
        weights={name: given[name] for name in _WEIGHTS if name in given},
        fields=dict(given.get("hf_config_overrides", {})),
        n_ctx=given.get("n_ctx"),
    )


def _check_placement(placement: dict[str, Any], device: str | None) -> None:
    ways = [name for name in ("device_map", "n_devices") if name in placement]
    if placement and not ways:
        raise ModelLoadError(f"load_model: {', '.join(placement)} need device_map=, for example device_map='auto'")
    if len(ways) == 2:
        raise ModelLoadError("load_model: device_map= and n_devices= both say where weights lie; give one")
    # Without weights there is nothing to place, but workers that load the same model place theirs.
    if ways and device not in (None, "meta"):
        raise ModelLoadError(f"load_model: device={device!r} and {ways[0]}= both say where weights lie; give one")


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(sorted(known))}"
