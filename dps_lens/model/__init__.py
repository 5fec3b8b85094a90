"""Models: load and check them, choose the attention kernel, run passes."""

from dps_lens.model.attention import HookedModel, is_bridge, native_attention, runs_native
from dps_lens.model.check import check_model
from dps_lens.model.describe import describe_model, described_as, has_weights
from dps_lens.model.lean import LeanSteps, reused_logits
from dps_lens.model.load import load_model, loader_of, wrap_model
from dps_lens.model.runner import PromptCache, Residuals, Runner

__all__ = [
    "HookedModel",
    "LeanSteps",
    "PromptCache",
    "Residuals",
    "Runner",
    "check_model",
    "describe_model",
    "described_as",
    "has_weights",
    "is_bridge",
    "load_model",
    "loader_of",
    "native_attention",
    "reused_logits",
    "runs_native",
    "wrap_model",
]
