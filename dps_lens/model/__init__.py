"""Models: load and check them, choose the attention kernel, run passes."""

from dps_lens.model.attention import native_attention
from dps_lens.model.check import check_model
from dps_lens.model.describe import describe_model, described_as, has_hooks, has_weights
from dps_lens.model.fast.bypass import BypassedHooks, reused_logits
from dps_lens.model.hooked_attention import check_attention_reads, check_attention_writes
from dps_lens.model.hooking import Hooks
from dps_lens.model.kernels import runs_native
from dps_lens.model.load import load_model, loader_of
from dps_lens.model.protocol import HookedModel, ModelConfig, hf_model_of, is_bridge
from dps_lens.model.runner import PromptCache, Residuals, Runner
from dps_lens.model.runners import runner_of
from dps_lens.model.thread import ModelThread
from dps_lens.model.use import in_use
from dps_lens.model.wrap import wrap_model

__all__ = [
    "BypassedHooks",
    "HookedModel",
    "Hooks",
    "ModelConfig",
    "ModelThread",
    "PromptCache",
    "Residuals",
    "Runner",
    "check_attention_reads",
    "check_attention_writes",
    "check_model",
    "describe_model",
    "described_as",
    "has_hooks",
    "has_weights",
    "hf_model_of",
    "in_use",
    "is_bridge",
    "load_model",
    "loader_of",
    "native_attention",
    "reused_logits",
    "runner_of",
    "runs_native",
    "wrap_model",
]
