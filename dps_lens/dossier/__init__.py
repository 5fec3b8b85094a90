"""What a head does for users."""

from dps_lens.dossier.describe import describe_head
from dps_lens.dossier.result import Dossier

__all__ = ["Dossier", "describe_head"]
