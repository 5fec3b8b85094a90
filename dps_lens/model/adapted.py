"""PEFT adapters: merged into the weights of their base model, so that everything works on plain modules."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dps_lens.errors import ModelLoadError, reason
from dps_lens.model.options import Options
from dps_lens.model.same import deviation, logits_of

_LOOKED_UP = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter.

    Args:
        source: its folder or Hub id.
        config: its `adapter_config.json`.
    """

    source: str
    config: dict[str, Any]

    @property
    def kind(self) -> str:
        """LORA, IA3, …"""
        return str(self.config.get("peft_type"))

    @property
    def base(self) -> str:
        """The folder or Hub id of the model that it changes."""
        named = self.config.get("base_model_name_or_path")
        if not named:
            raise ModelLoadError(
                f"load_model: adapter_config.json of {self.source!r} does not say which model it changes; write "
                "base_model_name_or_path into it"
            )
        return str(named)

    @property
    def base_revision(self) -> str | None:
        return self.config.get("revision")

    def label(self, base: str) -> str:
        """What a model with this adapter is called."""
        return f"{Path(base).name}+{Path(self.source).name}"

    def has_tokenizer(self, options: Options) -> bool:
        from transformers.utils import cached_file

        found = cached_file(
            self.source,
            "tokenizer_config.json",
            **_look_up(options),
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found is not None


def find_adapter(source: str, options: Options) -> Adapter | None:
    """The adapter in a folder or on the Hub; None where there is a model, or nothing.

    Raises:
        ModelLoadError: a folder holds both.
    """
    from transformers.utils import find_adapter_config_file

    path = find_adapter_config_file(source, **_look_up(options))
    if path is None:
        return None
    if _holds_a_model(Path(path).parent):
        raise ModelLoadError(
            f"load_model: {source!r} holds a model and an adapter; move adapter_config.json and its weights elsewhere"
        )
    return Adapter(source, json.loads(Path(path).read_text(encoding="utf-8")))


def _holds_a_model(folder: Path) -> bool:
    weights = [file for pattern in _WEIGHT_FILES for file in folder.glob(pattern)]
    return (folder / "config.json").is_file() and any(not file.name.startswith("adapter_") for file in weights)


def _look_up(options: Options) -> dict[str, Any]:
    return {name: value for name, value in options.hub.items() if name in _LOOKED_UP}


def merged(model: Any, adapter: Adapter, options: Options) -> Any:
    """The base model with an adapter in its weights.

    Args:
        model: the base model, changed in place.
        adapter: LoRA with its variants (DoRA, rank-stabilised, ranks by module), or another kind that PEFT merges.
        options: of `load_model`.

    Raises:
        ModelLoadError: PEFT is not installed, cannot merge this adapter, or the merged model computes something else.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelLoadError(f"load_model: {adapter.source!r} is a PEFT adapter: pip install peft") from error
    config = peft.PeftConfig.from_pretrained(adapter.source, **_look_up(options))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ModelLoadError(
            f"load_model: the adapter {adapter.source!r} is {adapter.kind}, which adds to a model's input and not "
            "to its weights, so it cannot be merged into them"
        )
    try:
        adapted = _attach(model, config, adapter, options)
        before = logits_of(adapted)
        plain = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise ModelLoadError(
            f"load_model: the adapter {adapter.source!r} ({adapter.kind}) cannot be merged into {adapter.base!r}: "
            f"{reason(error)}"
        ) from error
    # Some kinds merge into weights that compute something else than the adapter did.
    if change := deviation(logits_of(plain), before):
        raise ModelLoadError(
            f"load_model: the adapter {adapter.source!r} ({adapter.kind}) merged into its base model changes the "
            f"logits by {change:.2g} of the largest, so the weights cannot hold all that it does"
        )
    return plain


def _attach(model: Any, config: Any, adapter: Adapter, options: Options) -> Any:
    """The model with the adapter beside its weights."""
    import peft

    config.inference_mode = True
    adapted = peft.get_peft_model(model, config)
    read = {**_look_up(options), "torch_device": str(model.device)}
    found = adapted.load_adapter(adapter.source, "default", **read)
    held = peft.load_peft_weights(adapter.source, device="cpu", **_look_up(options))
    needed = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    missing, unexpected = sorted(needed.keys() - held.keys()), sorted(found.unexpected_keys)
    if missing or unexpected:
        said = [f"{what} {', '.join(names[:4])}" for what, names in (("lacks", missing), ("adds", unexpected)) if names]
        raise ModelLoadError(
            f"load_model: the weights of the adapter {adapter.source!r} do not fit its config and model: it "
            f"{' and '.join(said)}"
        )
    return adapted.eval()
