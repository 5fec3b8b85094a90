"""dps_lens: find the attention heads that carry a user's preferences, prove it, and steer with them."""

from importlib import import_module
from typing import Any

_API = {
    "DPSLensError": "errors",
    "Endpoint": "evaluation",
    "Head": "heads",
    "HeadScores": "scores",
    "HeadSet": "heads",
    "PromptConfig": "data",
    "RayEngine": "cluster",
    "SetEffects": "analysis",
    "Shard": "cluster",
    "SteeringVector": "steering",
    "ablate": "intervene",
    "ablated_generation": "analysis",
    "ablation_cost": "analysis",
    "ablation_curve": "analysis",
    "attention_pattern": "analysis",
    "build_prompt": "data",
    "chat_prompt": "data",
    "check_model": "model",
    "cluster_users": "analysis",
    "evaluate": "evaluation",
    "explore": "explorer",
    "export_lora": "steering.lora",
    "generate": "steering",
    "held_out_effects": "analysis",
    "judge": "evaluation",
    "load_model": "model",
    "load_users": "data",
    "logits_processor": "steering.processor",
    "measure_noise": "analysis",
    "merge_runs": "cluster",
    "overlap": "analysis",
    "patch_heads": "analysis",
    "preference_vector": "analysis",
    "profile_attention": "analysis",
    "random_heads": "families",
    "record_z": "intervene",
    "reference_heads": "families",
    "score_heads": "scoring",
    "screening_recall": "analysis",
    "significant_heads": "analysis",
    "split_half": "analysis",
    "stability": "analysis",
    "steering_grid": "evaluation",
    "steering_sweep": "analysis",
    "steerx_vector": "steering",
    "style_vector": "steering",
    "vector_recovery": "analysis",
}

__all__ = [*_API, "plots"]  # noqa: PLE0604
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import dps_lens` stays quick."""
    if name == "plots":
        return import_module("dps_lens.plots")
    if name not in _API:
        raise AttributeError(f"module 'dps_lens' has no attribute {name!r}")
    return getattr(import_module(f"dps_lens.{_API[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
