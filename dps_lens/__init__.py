"""dps_lens: find the attention heads that carry a user's preferences, prove it, and steer with them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dps_lens.version import __version__ as __version__

if TYPE_CHECKING:
    from dps_lens import plots
    from dps_lens.adapters import export_generate, export_lora, export_vector, logits_processor
    from dps_lens.atlas import Atlas, compare_atlas, load_atlas
    from dps_lens.data import (
        Document,
        Example,
        Note,
        Prompt,
        PromptConfig,
        User,
        build_prompt,
        chat_prompt,
        load_users,
        make_pairs,
    )
    from dps_lens.dossier import Dossier, describe_head
    from dps_lens.engines import RayEngine, Shard, merge_runs
    from dps_lens.errors import DPSLensError
    from dps_lens.evaluation import (
        AblatedTexts,
        Endpoint,
        EvaluateConfig,
        Evaluation,
        Metric,
        SteeredText,
        SteeringGrid,
        SteeringSweep,
        Verdicts,
        ablated_generation,
        evaluate,
        judge,
        steering_grid,
        steering_sweep,
    )
    from dps_lens.explorer import Exploration, LivePage, explore, serve
    from dps_lens.families import (
        Copying,
        Family,
        FunctionVector,
        ProfileRetrieval,
        Repeated,
        Retrieval,
        StyleModulation,
        reference_heads,
    )
    from dps_lens.finding import (
        Bounds,
        CausalGates,
        Conditional,
        FindConfig,
        Finder,
        Fit,
        Gates,
        GatingConfig,
        Greedy,
        Rank,
        Trial,
        causal_head_gates,
        find_heads,
    )
    from dps_lens.found import FoundHeads
    from dps_lens.heads import Head, HeadSet
    from dps_lens.intervene import Ablation, Context, Mean, Patch, Uniform, Zero, ablate, record_z
    from dps_lens.model import HookedModel, check_model, load_model
    from dps_lens.paths import PathEffects, patch_paths
    from dps_lens.result import Result
    from dps_lens.scores import HeadScores, NoiseFloor
    from dps_lens.scoring import NLL, AnswersObjective, Choice, Objective, Pair, ScoreConfig, score_heads
    from dps_lens.selection import random_heads
    from dps_lens.stats import (
        Overlap,
        Significance,
        UserClusters,
        cluster_users,
        overlap,
        screening_recall,
        significant_heads,
        split_half,
        stability,
    )
    from dps_lens.steering import (
        DecodeConfig,
        Generation,
        HeadVector,
        Sampling,
        SteeringVector,
        Term,
        TextStream,
        generate,
    )
    from dps_lens.validation import (
        AnswerRanks,
        AttentionPattern,
        Faithfulness,
        HeldOutConfig,
        SetEffects,
        VectorConfig,
        ablation_cost,
        ablation_curve,
        attention_pattern,
        faithfulness,
        held_out_effects,
        measure_noise,
        patch_heads,
        profile_attention,
        rank_answers,
        vector_recovery,
    )
    from dps_lens.vectors import HeadVectors, head_vectors, preference_vector, steerx_vector, style_vector
    from dps_lens.work import Engine, RunConfig

_MODULES = {
    "adapters": "export_generate export_lora export_vector logits_processor",
    "atlas": "Atlas compare_atlas load_atlas",
    "data": "Document Example Note Prompt PromptConfig User build_prompt chat_prompt load_users make_pairs",
    "dossier": "Dossier describe_head",
    "engines": "RayEngine Shard merge_runs",
    "errors": "DPSLensError",
    "evaluation": (
        "AblatedTexts Endpoint EvaluateConfig Evaluation Metric SteeredText SteeringGrid SteeringSweep "
        "Verdicts ablated_generation evaluate judge steering_grid steering_sweep"
    ),
    "explorer": "Exploration LivePage explore serve",
    "families": "Copying Family FunctionVector ProfileRetrieval Repeated Retrieval StyleModulation reference_heads",
    "finding": (
        "Bounds CausalGates Conditional FindConfig Finder Fit Gates GatingConfig Greedy Rank Trial causal_head_gates "
        "find_heads"
    ),
    "found": "FoundHeads",
    "heads": "Head HeadSet",
    "intervene": "Ablation Context Mean Patch Uniform Zero ablate record_z",
    "model": "HookedModel check_model load_model",
    "paths": "PathEffects patch_paths",
    "result": "Result",
    "scores": "HeadScores NoiseFloor",
    "scoring": "AnswersObjective Choice NLL Objective Pair ScoreConfig score_heads",
    "selection": "random_heads",
    "stats": (
        "Overlap Significance UserClusters cluster_users overlap screening_recall significant_heads "
        "split_half stability"
    ),
    "steering": "DecodeConfig Generation HeadVector Sampling SteeringVector Term TextStream generate",
    "validation": (
        "AnswerRanks AttentionPattern Faithfulness HeldOutConfig SetEffects VectorConfig ablation_cost ablation_curve "
        "attention_pattern faithfulness held_out_effects measure_noise patch_heads profile_attention rank_answers "
        "vector_recovery"
    ),
    "vectors": "HeadVectors head_vectors preference_vector steerx_vector style_vector",
    "work": "Engine RunConfig",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

# fmt: off
__all__ = [
    "NLL", "AblatedTexts", "Ablation", "AnswerRanks", "AnswersObjective", "Atlas", "AttentionPattern", "Bounds",
    "CausalGates", "Choice", "Conditional", "Context", "Copying", "DPSLensError", "DecodeConfig", "Document",
    "Dossier", "Endpoint", "Engine", "EvaluateConfig", "Evaluation", "Example", "Exploration", "Faithfulness",
    "Family", "FindConfig", "Finder", "Fit", "FoundHeads", "FunctionVector", "Gates", "GatingConfig", "Generation",
    "Greedy", "Head", "HeadScores", "HeadSet", "HeadVector", "HeadVectors", "HeldOutConfig", "HookedModel", "LivePage",
    "Mean", "Metric", "NoiseFloor", "Note", "Objective", "Overlap", "Pair", "Patch", "PathEffects", "ProfileRetrieval",
    "Prompt", "PromptConfig", "Rank", "RayEngine", "Repeated", "Result", "Retrieval", "RunConfig", "Sampling",
    "ScoreConfig", "SetEffects", "Shard", "Significance", "SteeredText", "SteeringGrid", "SteeringSweep",
    "SteeringVector", "StyleModulation", "Term", "TextStream", "Trial", "Uniform", "User", "UserClusters",
    "VectorConfig", "Verdicts", "Zero", "ablate", "ablated_generation", "ablation_cost", "ablation_curve",
    "attention_pattern", "build_prompt", "causal_head_gates", "chat_prompt", "check_model", "cluster_users",
    "compare_atlas", "describe_head", "evaluate", "explore", "export_generate", "export_lora", "export_vector",
    "faithfulness", "find_heads", "generate", "head_vectors", "held_out_effects", "judge", "load_atlas", "load_model",
    "load_users", "logits_processor", "make_pairs", "measure_noise", "merge_runs", "overlap", "patch_heads",
    "patch_paths", "plots", "preference_vector", "profile_attention", "random_heads", "rank_answers", "record_z",
    "reference_heads", "score_heads", "screening_recall", "serve", "significant_heads", "split_half", "stability",
    "steering_grid", "steering_sweep", "steerx_vector", "style_vector", "vector_recovery",
]
# fmt: on


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import dps_lens` stays quick."""
    if name == "plots":
        return import_module("dps_lens.plots")
    if name not in _HOME:
        raise AttributeError(f"module 'dps_lens' has no attribute {name!r}")
    return getattr(import_module(f"dps_lens.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
