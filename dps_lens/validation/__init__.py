"""Proof: runs of a model on held-out examples with heads ablated, patched or looked at."""

from dps_lens.validation.answers import AnswerRanks, rank_answers
from dps_lens.validation.attention import AttentionPattern, attention_pattern, profile_attention
from dps_lens.validation.circuits import Faithfulness
from dps_lens.validation.curve import ablation_cost, ablation_curve
from dps_lens.validation.effects import SetEffects
from dps_lens.validation.faithfulness import faithfulness
from dps_lens.validation.held_out import held_out_effects, measure_noise
from dps_lens.validation.patch import patch_heads
from dps_lens.validation.vectors import VectorConfig, vector_recovery
from dps_lens.validation.work import HeldOutConfig

__all__ = [
    "AnswerRanks",
    "AttentionPattern",
    "Faithfulness",
    "HeldOutConfig",
    "SetEffects",
    "VectorConfig",
    "ablation_cost",
    "ablation_curve",
    "attention_pattern",
    "faithfulness",
    "held_out_effects",
    "measure_noise",
    "patch_heads",
    "profile_attention",
    "rank_answers",
    "vector_recovery",
]
