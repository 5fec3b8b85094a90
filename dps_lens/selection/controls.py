"""Random heads as controls: disjoint from their target and from the same layers."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from dps_lens.errors import HeadError
from dps_lens.heads import Head, HeadSet
from dps_lens.model import HookedModel


def random_heads(
    model: HookedModel, like: HeadSet, *, match: Literal["layer", "nearest", "none"] = "layer", seed: int = 0
) -> HeadSet:
    """Draw as many heads as `like` holds, none of them in `like`.

    Args:
        model: the heads are drawn from its config.
        like: the set that is controlled for.
        match: `"layer"` draws as many heads from each layer as `like` has there; `"nearest"` does the same
            and takes what a layer lacks from the layers nearest to it; `"none"` draws from anywhere.
        seed: of the draw.

    Raises:
        HeadError: `like` leaves too few heads, in a layer or in the model.
    """
    cfg = model.cfg
    like.mask(cfg)
    rng = random.Random(f"random_heads|{seed}")
    free = [Head(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    free = [head for head in free if head not in like]
    if len(free) < len(like):
        raise HeadError(f"random_heads: {len(like)} heads asked for, {len(free)} are outside the target set")
    if match == "none":
        return HeadSet(rng.sample(free, len(like)), "random", (cfg.n_layers, cfg.n_heads))
    if match not in ("layer", "nearest"):
        raise HeadError(f"random_heads: match {match!r} is unknown; use 'layer', 'nearest' or 'none'")
    chosen: list[Head] = []
    for layer, count in sorted(Counter(head.layer for head in like).items()):
        others = [head for head in free if head.layer == layer]
        if len(others) < count and match == "layer":
            raise HeadError(
                f"random_heads: layer {layer} has {len(others)} heads outside the target set, {count} are needed; "
                "use a smaller set, match='nearest' or match='none'"
            )
        chosen.extend(rng.sample(others, min(count, len(others))))
    missing = Counter(head.layer for head in like) - Counter(head.layer for head in chosen)
    for layer in missing.elements():
        left = [head for head in free if head not in chosen]
        distance = min(abs(head.layer - layer) for head in left)
        chosen.append(rng.choice([head for head in left if abs(head.layer - layer) == distance]))
    return HeadSet(chosen, "random", (cfg.n_layers, cfg.n_heads))


def random_beside(model: HookedModel, head: Head, n: int, *, avoid: HeadSet | None = None, seed: int = 0) -> HeadSet:
    """At most `n` random other heads of one head's layer, the control of single heads.

    Args:
        model: the heads are drawn from its config.
        head: the head that is controlled for.
        n: how many, where the layer has as many.
        avoid: heads that are taken only where the layer has no others left.
        seed: of the order, which all heads of a layer share.
    """
    cfg = model.cfg
    layer = [Head(head.layer, index) for index in range(cfg.n_heads) if index != head.head]
    shuffled = random.Random(f"random_beside|{seed}|{head.layer}").sample(layer, len(layer))
    ranked = sorted(shuffled, key=lambda one: avoid is not None and one in avoid)
    return HeadSet(ranked[:n], "random", (cfg.n_layers, cfg.n_heads))


def draw_seed(seed: int, draw: int) -> int:
    """The seed of one draw, so that runs with other seeds share no random set."""
    return seed * 1_000_003 + draw


def random_sets(model: HookedModel, like: HeadSet, draws: int | Sequence[int], seed: int = 0) -> list[HeadSet]:
    """The random control of every call: sets of the layers of `like`, and disjoint from it.

    Nearest layers step in where a layer has too few other heads.

    Args:
        model: the heads are drawn from its config.
        like: the set that is controlled for.
        draws: how many, or which of them.
        seed: of all draws.
    """
    numbers = range(draws) if isinstance(draws, int) else draws
    return [random_heads(model, like, match="nearest", seed=draw_seed(seed, draw)) for draw in numbers]


def random_rankings(model: HookedModel, n: int, seed: int = 0) -> list[HeadSet]:
    """All heads of the model in random orders, the control of rankings as a whole.

    Args:
        model: its config says which heads there are.
        n: how many rankings.
        seed: of all of them.
    """
    cfg = model.cfg
    everything = [Head(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    generators = [random.Random(f"random_rankings|{draw_seed(seed, draw)}") for draw in range(n)]
    return [
        HeadSet(rng.sample(everything, len(everything)), "random", (cfg.n_layers, cfg.n_heads)) for rng in generators
    ]
