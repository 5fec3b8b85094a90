"""Reference families: scores of every head as a member of known families."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from platformdirs import user_cache_path

from dps_lens.data.tokenizer import tokenizer_digest
from dps_lens.errors import ScoreError
from dps_lens.families.copying import Copying
from dps_lens.families.function_vector import FunctionVector
from dps_lens.families.repeated import Repeated
from dps_lens.families.retrieval import Retrieval
from dps_lens.model import HookedModel, describe_model, has_hooks
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.work import Engine, RunConfig


@runtime_checkable
class Family(Protocol):
    """A way to score heads for one thing that they are known to do; `reference_heads` takes any object like this."""

    @property
    def name(self) -> str:
        """The key of its scores."""
        ...

    @property
    def unit(self) -> str:
        """What a score counts."""
        ...

    def settings(self) -> dict[str, Any]:
        """What decides the scores."""
        ...

    def score(
        self, model: HookedModel, *, folder: RunFolder | None, engine: Engine | None, progress: bool
    ) -> HeadScores:
        """Scores `[prompt layer head]`; units, if it has any, are kept in the folder and made by the engine."""
        ...


Kind: TypeAlias = str | Family
KINDS = (*Repeated.kinds, *Copying.kinds, Retrieval.name, FunctionVector.name)


def reference_heads(
    model: HookedModel,
    kinds: Sequence[Kind] = ("induction", "retrieval", "function_vector"),
    *,
    cache: bool | str | Path = True,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> dict[str, HeadScores]:
    """Score every head as a member of known families.

    Args:
        model: a hooked model.
        kinds: `"induction"`, `"previous_token"`, `"duplicate_token"`, `"copying"`, `"copy_suppression"`, `"retrieval"`,
            `"function_vector"`; or a family with settings of your own: `Repeated("induction", n_prompts=50)`,
            `Copying("copying", reach=5)`, `Retrieval(haystack=…, lengths=…)`, `FunctionVector(tasks=…)`, and
            `ProfileRetrieval(users)` and `StyleModulation(users)`, which read users' discovery examples.
        cache: keep scores in the user's cache folder, or in this folder, and read them from there for the same
            model and settings; False computes anew. A model with hooks, as inside `ablate`, is always computed.
            An interrupted call resumes there.
        engine: as in `score_heads`.
        run_config: progress bars.

    Returns:
        family → scores. A family that the model does not show (too few needles recalled, in-context
        accuracy at chance) is NaN; `scores.defined` is then False and `manifest["reason"]` says why.

    Raises:
        ScoreError: a kind is unknown, or given twice.
    """
    if engine is not None:
        engine.start(model)
    scored: dict[str, HeadScores] = {}
    about = {"model": describe_model(model), "tokenizer": tokenizer_digest(model)}
    for kind in kinds:
        family = _family(kind)
        manifest = {
            "call": "reference_heads",
            "family": family.name,
            "settings": json.loads(json.dumps(family.settings())),
            **_source(family),
            **about,
        }
        if family.name in scored:
            raise ScoreError(f"reference_heads: two families are called {family.name!r}; score them in two calls")
        folder = None if has_hooks(model) else _folder(cache, manifest)
        scores = _cached(folder, manifest)
        if scores is None:
            run = RunFolder(folder, manifest) if folder else None
            scores = family.score(model, folder=run, engine=engine, progress=(run_config or RunConfig()).progress)
            scores.manifest = manifest | scores.manifest
            if folder and "quarantined" not in scores.manifest:
                scores.save(folder)
        scores.manifest["unit"] = family.unit
        scored[family.name] = scores
    return scored


def _family(kind: Kind) -> Family:
    if not isinstance(kind, str):
        return kind
    if kind in Repeated.kinds:
        return Repeated(kind)
    if kind in Copying.kinds:
        return Copying(kind)
    if kind == Retrieval.name:
        return Retrieval()
    if kind == FunctionVector.name:
        return FunctionVector()
    raise ScoreError(f"reference_heads: kind {kind!r} is unknown; use one of {', '.join(KINDS)}, or a family object")


def _folder(cache: bool | str | Path, manifest: dict[str, Any]) -> Path | None:
    if cache is False:
        return None
    root = user_cache_path("dps_lens") / "families" if cache is True else Path(cache)
    return root / f"{manifest['family']}-{_digest(manifest)}"


def _source(family: Family) -> dict[str, str]:
    """Families of the package change with its version; those of somebody's own with their text."""
    kind = type(family)
    if kind.__module__.startswith("dps_lens."):
        return {}
    try:
        return {"source": _digest(inspect.getsource(kind))}
    except (OSError, TypeError):
        return {}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _cached(folder: Path | None, manifest: dict[str, Any]) -> HeadScores | None:
    if folder is None:
        return None
    try:
        scores = HeadScores.load(folder)
    except ScoreError:
        return None
    return scores if all(scores.manifest.get(key) == value for key, value in manifest.items()) else None
