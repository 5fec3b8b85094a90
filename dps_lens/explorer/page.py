"""The page: what it shows, one template, one script, and the data as JSON that nothing runs."""

import base64
import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from plotly.colors import get_colorscale
from torch import Tensor

from dps_lens.data.examples import key_of
from dps_lens.dossier import Dossier
from dps_lens.errors import RunError, ScoreError, reason
from dps_lens.evaluation import SteeringGrid
from dps_lens.explorer.render import rendered
from dps_lens.files import replacing, write_text
from dps_lens.found import FoundHeads
from dps_lens.heads import Head, HeadSet
from dps_lens.paths import PathEffects
from dps_lens.plots import ablation, dossier, families, k_sweep, overlap, pareto, paths
from dps_lens.plots.theme import SIGNED
from dps_lens.scores import HeadScores, t_quantile
from dps_lens.stats.overlap import Overlap
from dps_lens.stats.significance import MIN_USERS, significant_heads
from dps_lens.stats.skew import is_skewed
from dps_lens.validation.effects import SetEffects

MAX_VALUES = 5_000_000
"""Values of examples that a page holds, two bytes each; above, a page shows the means of users."""

_SINGLE = 500_000
FRAME = 'width="100%" height="900" style="border: 0" title="Preference Heads"'
"""Of a page inside a notebook."""

_GENERATOR = b'<meta name="generator" content="dps_lens">'


class Answer(NamedTuple):
    """An answer, and what the user's own profile does to it.

    Attributes:
        pieces: text of each token.
        gains: log p with the own profile minus log p without one, nats, of each token.
    """

    pieces: tuple[str, ...]
    gains: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ExampleView:
    """What heads look at in one prompt, and what its profile does to the answers.

    Attributes:
        user: who asks.
        example: its id.
        pieces: text of each token of the prompt and its response.
        spans: `"profile"`, `"task"` and `"response"`, `(start, stop)`.
        heads: whose attention is there.
        attention: mean over the positions that give the response.
        answers: the user's own, then the rejected ones.
        documents: `(start, stop)` of each document of the profile.
        by_token: attention from each position that gives the response, of the first heads.
    """

    user: str
    example: str
    pieces: tuple[str, ...]
    spans: dict[str, tuple[int, int]]
    heads: tuple[Head, ...]
    attention: Float[Tensor, "head pos"]
    answers: tuple[Answer, ...] = ()
    documents: tuple[tuple[int, int], ...] = ()
    by_token: "Float[Tensor, 'some_heads query pos'] | None" = None


@dataclass(frozen=True)
class Exploration:
    """What `explore` collects for a page.

    Attributes:
        scores: of `score_heads`.
        heads: that are outlined.
        families: reference families by name.
        maps: other scores of the same users, by name, to switch to.
        between_users: overlap of the users' top heads, where there are at least two users.
        between_families: overlap of the families' top heads, where there are any.
        effects: of `ablation_curve`.
        cost: of `ablation_cost`.
        views: attention on some held-out examples.
        grid: steered texts.
        mechanism: what heads do, and who feeds them.
        title: of the page.
        note: below it, such as what is still missing.
        found: the set that is outlined, where `find_heads` found it.
    """

    scores: HeadScores
    heads: HeadSet
    families: dict[str, HeadScores] = field(default_factory=dict)
    maps: dict[str, HeadScores] = field(default_factory=dict)
    between_users: Overlap | None = None
    between_families: Overlap | None = None
    effects: SetEffects | None = None
    cost: SetEffects | None = None
    views: tuple[ExampleView, ...] = ()
    grid: SteeringGrid | None = None
    mechanism: tuple[Dossier | PathEffects, ...] = ()
    title: str = "Preference Heads"
    note: str = ""
    found: FoundHeads | None = None

    def showing(self, *results: Dossier | PathEffects) -> "Exploration":
        """The same with a tab of dossiers and paths, of `describe_head` and `patch_paths`.

        Raises:
            ScoreError: something else was given, or one of another model.
        """
        for one in results:
            if not isinstance(one, (Dossier, PathEffects)):
                raise ScoreError(f"showing: give what describe_head or patch_paths found, not a {type(one).__name__}")
            theirs, ours = (of.manifest.get("model", {}) for of in (one, self.scores))
            if theirs and ours and theirs["name"] != ours["name"]:
                raise ScoreError(f"showing: {theirs['name']!r} is not the model of this page, {ours['name']!r}")
        return replace(self, mechanism=(*self.mechanism, *results))

    def write(self, path: str | Path, *, force: bool = False) -> Path:
        """Write one HTML file that opens without a network and runs no script but its own.

        Args:
            path: the file; an older page is replaced.
            force: replace whatever is there.

        Raises:
            RunError: there is a file that is no page of dps_lens.
        """
        if not force:
            check_page(path)
        write_text(path, page(self))
        return Path(path)

    def _repr_html_(self) -> str:
        """The page inside a notebook."""
        return f'<iframe srcdoc="{escape(page(self), quote=True)}" {FRAME}></iframe>'


def check_page(path: str | Path) -> None:
    """Refuse to write a page over something else.

    Raises:
        RunError: there is a file that is no page of dps_lens.
    """
    if not Path(path).exists():
        return
    try:
        with Path(path).open("rb") as file:
            own = _GENERATOR in file.read(1000)
    except OSError as error:
        raise RunError(f"{path} cannot be read ({reason(error)}); use another file") from error
    if not own:
        raise RunError(f"{path} is there and is no page of dps_lens; use another file, or --force to replace it")


def page(found: Exploration, *, live: Mapping[str, Any] | None = None) -> str:
    """The whole page.

    Args:
        found: what to show.
        live: let the page ask its server; what its form starts from.
    """
    return rendered(described(found), live=live)


def described(found: Exploration) -> dict[str, Any]:
    """What a page says and draws, as plain values."""
    return {
        "title": found.title,
        "lead": _lead(found),
        "note": found.note,
        "verdict": found.cost.verdict() if found.cost is not None else "",
        "facts": facts(found),
        "mechanism": bool(found.mechanism),
        "data": content(found),
    }


def pack(found: Exploration, path: str | Path) -> None:
    """Keep what a page says and draws, without the script that draws it, under a note of what made it."""
    made = found.scores.manifest["made"]
    note = f"Made by dps_lens {made['dps_lens']} on {made['date'][:10]} with: {made['command']}"
    said = described(found) | {"note": note}
    packed = gzip.compress(json.dumps(said, ensure_ascii=False, allow_nan=False).encode(), mtime=0)
    with replacing(path) as temporary:
        temporary.write_bytes(packed)


def content(found: Exploration) -> dict[str, Any]:
    """What the script draws, as plain values."""
    scores = found.scores
    layers, heads = scores.values.shape[1:]
    parts = scores.components if len(scores.components) > 1 else {}
    maps = {scores.name: scores.samples()} | {scores.name_of(of): scores.samples(of=of) for of in parts}
    if twice := [name for name in found.maps if name in maps]:
        raise ScoreError(f"a page needs another name for the scores {twice[0]!r}, which is that of its own map")
    maps |= {name: other.samples() for name, other in found.maps.items()}
    sizes = {len(scores.users), *(len(scores.rows(user)) for user in scores.users)}
    return {
        "layers": layers,
        "heads": heads,
        "unit": scores.manifest.get("unit", "nats per token"),
        "colours": get_colorscale(SIGNED),
        "users": list(scores.users),
        "main": scores.name,
        "maps": {name: _packed(values) for name, values in maps.items()},
        "examples": _examples(scores),
        "t": {size: t_quantile(size - 1, 0.95) for size in sizes if size > 1},
        "families": {name: _family(family) for name, family in found.families.items()},
        "tops": [str(head) for head in found.heads],
        "outlined": _outlined(found),
        "significant": significant(scores),
        "figures": _figures(found),
        "cost": _rows(found.cost.beside_random().to_dict("records")) if found.cost is not None else [],
        "views": [_view(view) for view in found.views],
        "grid": _grid(found),
    }


def _lead(found: Exploration) -> str:
    scores = found.scores
    model = scores.manifest.get("model", {})
    lead = f"{model.get('name', 'model')}: {len(scores.users)} users, {len(scores.user_ids)} discovery examples"
    return lead + (f", {len(found.cost.user_ids)} held out" if found.cost is not None else "")


def _outlined(found: Exploration) -> str:
    """What the outlined heads are."""
    n, tested = len(found.heads), [*map(str, found.cost.sets().values())] if found.cost is not None else []
    if found.found is not None:
        crossed = "; each user is tested with those that others choose" if tested and found.found.folds else ""
        return f"the {n} heads that find_heads found{crossed}"
    return f"the {n} heads that are tested" if {*tested} == {str(found.heads)} else f"the top {n} heads"


def _examples(scores: HeadScores) -> dict[str, Any] | None:
    if scores.values.numel() > MAX_VALUES:
        return None
    place = {user: index for index, user in enumerate(scores.users)}
    return {
        "ids": list(scores.example_ids),
        "user": [place[user] for user in scores.user_ids],
        "values": _packed(scores.values),
    }


def _family(family: HeadScores) -> dict[str, Any]:
    if not family.defined:
        return {"reason": str(family.manifest.get("reason", "not defined"))}
    return {"unit": str(family.manifest.get("unit", "")), "values": _packed(family.mean())}


def _figures(found: Exploration) -> dict[str, Any]:
    """Figures of `dps_lens.plots`, by tab and name."""
    drawn: dict[str, dict[str, Any]] = {"overlap": {}, "ablation": {}, "texts": {}, "mechanism": {}}
    if found.between_users is not None:
        drawn["overlap"]["users"] = overlap(found.between_users)
    if found.between_families is not None:
        drawn["overlap"]["families"] = overlap(found.between_families)
        defined = {name: family for name, family in found.families.items() if family.defined}
        for name, family in defined.items():
            shown = families(found.scores, family, k=len(found.heads), names=("scores", name.replace("_", " ")))
            drawn["overlap"][f"scores and {name.replace('_', ' ')}"] = shown
    if found.effects is not None:
        drawn["ablation"]["gain beside costs"] = ablation(found.effects)
        for measure in found.effects.measures:
            drawn["ablation"][measure] = ablation(found.effects, measure=measure)
    if found.grid is not None and len({one.user for one in found.grid.texts}) > 1:
        if "style" in found.grid.measures:
            drawn["texts"]["style against fluency"] = pareto(found.grid)
        for measure in found.grid.measures:
            drawn["texts"][f"{measure} by K"] = k_sweep(found.grid, measure=measure)
    for one in found.mechanism:
        name = str(one.head) if isinstance(one, Dossier) else "paths"
        numbers = (f"{name} ({number})" for number in range(2, len(found.mechanism) + 1))
        free = next(title for title in (name, *numbers) if title not in drawn["mechanism"])
        drawn["mechanism"][free] = dossier(one) if isinstance(one, Dossier) else paths(one)
    return {tab: {name: json.loads(one.to_json()) for name, one in of.items()} for tab, of in drawn.items()}


def _view(view: ExampleView) -> dict[str, Any]:
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


def _grid(found: Exploration) -> dict[str, Any] | None:
    grid = found.grid
    if grid is None:
        return None
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


def _rows(rows: list[dict[Any, Any]]) -> list[dict[str, Any]]:
    return [
        {str(key): None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
        for row in rows
    ]


def _packed(values: Tensor) -> dict[str, str]:
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


def facts(found: Exploration) -> list[tuple[str, str]]:
    """Settings of the run."""
    manifest = found.scores.manifest
    model, prompt = manifest.get("model", {}), manifest.get("prompt_config", {})
    size = f"{model.get('n_layers')} layers × {model.get('n_heads')} heads, {model.get('dtype')}"
    rows = [
        ("model", f"{model.get('name')}, {size}"),
        (
            "ablation",
            f"{manifest.get('ablation')}, positions {manifest.get('positions')}, against {manifest.get('against')}",
        ),
        ("sign", str(manifest.get("sign", ""))),
        ("prompts", ", ".join(f"{name} {value}" for name, value in prompt.items())),
        ("outlined heads", str(found.heads)),
    ]
    if found.cost is not None:
        cost = found.cost.manifest
        layers = set(found.cost.to_frame()["controls"].dropna()) or {"same layers"}
        rows.append(("controls", f"{cost['n_random']} random sets, {', '.join(layers)}, seed {cost['seed']}"))
    if found.grid is not None:
        about, who = found.grid.manifest, "other users" if len(found.scores.users) > 1 else "the user's older texts"
        rows.append(
            (
                "texts",
                f"rule {about['rule']}, greedy, at most {about['max_new_tokens']} tokens; heads chosen by {who}",
            )
        )
    made = manifest.get("made", {})
    rows.append(("seed", str(manifest.get("seed", ""))))
    rows.append(("data", f"digest {str(manifest.get('data', ''))[:16]}"))
    rows.append(("made", f"{made.get('date', '')} with: {made.get('command', '')}"))
    libraries = model.get("libraries", {})
    return [*rows, ("libraries", ", ".join(f"{name} {version}" for name, version in libraries.items()))]
