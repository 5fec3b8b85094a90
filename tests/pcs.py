"""The paper's kind of score, measured head by head, for tests of what surrounds a score."""

import dps_lens as dps

ZERO = {"ablation": "zero", "against": "no_profile", "method": "exact"}


def score_pcs(model, users, **options):
    """`score_heads` by zero ablation of one head at a time, own profile minus none, where nothing else is asked for."""
    return dps.score_heads(model, users, **{**ZERO, **options})
