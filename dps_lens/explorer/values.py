"""What a page draws, as plain values: numbers packed, so that it stays small."""

import base64
import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data.examples import key_of
from dps_lens.evaluation import SteeringGrid
from dps_lens.explorer.views import ExampleView
from dps_lens.heads import Head
from dps_lens.scores import HeadScores
from dps_lens.stats.significance import MIN_USERS, significant_heads
from dps_lens.stats.skew import is_skewed

MAX_VALUES = 5_000_000
"""Values of examples that a page holds, two bytes each; above, a page shows the means of users."""

_SINGLE = 500_000


def of_examples(scores: HeadScores) -> dict[str, Any] | None:
    """Values of single examples, where a page can hold them."""
    if scores.values.numel() > MAX_VALUES:
        return None
    place = {user: index for index, user in enumerate(scores.users)}
    return {
        "ids": list(scores.example_ids),
        "user": [place[user] for user in scores.user_ids],
        "values": packed(scores.values),
    }


def of_family(family: HeadScores) -> dict[str, Any]:
    """The mean map of a family, or why there is none."""
    if not family.defined:
        return {"reason": str(family.manifest.get("reason", "not defined"))}
    return {"unit": str(family.manifest.get("unit", "")), "values": packed(family.mean())}


def of_view(view: ExampleView) -> dict[str, Any]:
    """Attention in one prompt, in bytes, and what its profile does to the answers."""
    largest, values = _in_bytes(view.attention)
    by_token = (
        None if view.by_token is None else dict(zip(("largest", "values"), _in_bytes(view.by_token), strict=True))
    )
    return {
        "key": key_of(view.user, view.example),
        "user": view.user,
        "example": view.example,
        "pieces": list(view.pieces),
        "spans": view.spans,
        "heads": [str(head) for head in view.heads],
        "largest": largest,
        "values": values,
        "documents": view.documents,
        "byToken": by_token,
        "answers": [{"pieces": one.pieces, "gains": [round(gain, 3) for gain in one.gains]} for one in view.answers],
    }


def _in_bytes(attention: Float[Tensor, "head ..."]) -> tuple[list[float], str]:
    """The largest value of each head, and all values as shares of it, a byte each."""
    top = attention.flatten(1).amax(1).clamp(min=1e-9)
    scaled = (attention / top.view(-1, *[1] * (attention.ndim - 1)) * 255).round().to(torch.uint8)
    return [round(float(value), 4) for value in top], base64.b64encode(scaled.numpy().tobytes()).decode()


def of_grid(grid: SteeringGrid) -> dict[str, Any]:
    """Texts at every strength and number of heads."""
    return {
        "rule": grid.manifest.get("rule", "dps"),
        "gammas": list(grid.gammas),
        "ks": list(grid.ks),
        "references": grid.references,
        "texts": [
            {
                "key": one.key,
                "user": one.user,
                "example": one.example,
                "gamma": one.gamma,
                "k": one.k,
                "heads": one.heads,
                "pieces": one.pieces,
                "shifts": one.shifts,
                "kl": one.kl,
                "alternatives": one.alternatives,
                "scores": {name: round(value, 3) for name, value in one.scores.items()},
            }
            for one in grid.texts
        ],
    }


def of_rows(rows: list[dict[Any, Any]]) -> list[dict[str, Any]]:
    """Rows of a table; JSON knows no NaN."""
    return [
        {str(key): None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in rows
    ]


def packed(values: Tensor) -> dict[str, str]:
    """Numbers as base64, little-endian: single precision, or half where there are many, to keep a page small."""
    kind = "<f4" if values.numel() <= _SINGLE else "<f2"
    return {"kind": kind, "data": base64.b64encode(np.asarray(values.numpy(), dtype=kind).tobytes()).decode()}


def significant(scores: HeadScores) -> list[str]:
    """Names of the heads that a population of users shows, by the test that suits its effects; none for few users."""
    if len(scores.users) < MIN_USERS or not scores.defined:
        return []
    flips = 2000 if scores.values[0].numel() > 2000 else 10_000
    skewed = is_skewed(scores.skewness().numpy(), len(scores.users))
    found = significant_heads(scores, correction="bootstrap_t" if skewed else "max_t", n_flips=flips)
    return [str(Head(*at)) for at in found.significant.nonzero().tolist()]
