"""Heads in others' hands: a logits processor and a generate of transformers, LoRA adapters, control vectors."""

from dps_lens.adapters.hub import export_generate
from dps_lens.adapters.lora import export_lora
from dps_lens.adapters.processor import logits_processor
from dps_lens.adapters.vectors import export_vector

__all__ = ["export_generate", "export_lora", "export_vector", "logits_processor"]
