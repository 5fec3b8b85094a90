"""Beyond one process: units on the machines of a Ray cluster, or in shards that are merged."""

from dps_lens.engines.ray_engine import RayEngine
from dps_lens.engines.shards import Shard, merge_runs
from dps_lens.engines.summary import Summary

__all__ = ["RayEngine", "Shard", "Summary", "merge_runs"]
