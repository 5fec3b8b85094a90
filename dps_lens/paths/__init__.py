"""Paths between documents, heads and logits."""

from dps_lens.paths.direct import INTO, Into
from dps_lens.paths.patch import patch_paths
from dps_lens.paths.result import PathEffects

__all__ = ["INTO", "Into", "PathEffects", "patch_paths"]
