"""The page: what it shows, one template, one script, and the data as JSON that nothing runs."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from plotly.colors import get_colorscale

from dps_lens.dossier import Dossier
from dps_lens.errors import RunError, ScoreError, reason
from dps_lens.evaluation import SteeringGrid
from dps_lens.explorer.render import rendered
from dps_lens.explorer.values import of_examples, of_family, of_grid, of_rows, of_view, packed, significant
from dps_lens.explorer.views import ExampleView
from dps_lens.files import replacing, write_text
from dps_lens.found import FoundHeads
from dps_lens.heads import HeadSet
from dps_lens.paths import PathEffects
from dps_lens.plots import ablation, dossier, families, k_sweep, overlap, pareto, paths
from dps_lens.plots.theme import SIGNED
from dps_lens.scores import HeadScores, t_quantile
from dps_lens.stats.overlap import Overlap
from dps_lens.validation.effects import SetEffects

FRAME = 'width="100%" height="900" style="border: 0" title="Preference Heads"'
"""Of a page inside a notebook."""

_GENERATOR = b'<meta name="generator" content="dps_lens">'


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
        "maps": {name: packed(values) for name, values in maps.items()},
        "examples": of_examples(scores),
        "t": {size: t_quantile(size - 1, 0.95) for size in sizes if size > 1},
        "families": {name: of_family(family) for name, family in found.families.items()},
        "tops": [str(head) for head in found.heads],
        "outlined": _outlined(found),
        "significant": significant(scores),
        "figures": _figures(found),
        "cost": of_rows(found.cost.beside_random().to_dict("records")) if found.cost is not None else [],
        "views": [of_view(view) for view in found.views],
        "grid": of_grid(found.grid) if found.grid is not None else None,
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
        about = found.grid.manifest
        crossed = found.found is None or bool(found.found.folds)
        several = "other users" if crossed else "the older texts of all users"
        who = several if len(found.scores.users) > 1 else "the user's older texts"
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
