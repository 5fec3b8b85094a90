"""Heads in others' hands: a logits processor of transformers, LoRA adapters."""

from dps_lens.adapters.lora import export_lora
from dps_lens.adapters.processor import logits_processor

__all__ = ["export_lora", "logits_processor"]
