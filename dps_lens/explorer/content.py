"""Everything that the page shows, collected once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dps_lens.checks import check_whole
from dps_lens.data import PromptConfig, User
from dps_lens.errors import ScoreError
from dps_lens.evaluation import SteeringGrid, steering_grid
from dps_lens.explorer.page import Exploration
from dps_lens.explorer.views import ExampleView, ViewWork
from dps_lens.found import FoundHeads
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel, describe_model
from dps_lens.scores import HeadScores
from dps_lens.selection import check_held_out, rankings
from dps_lens.stats.overlap import Overlap, overlap
from dps_lens.validation.effects import SetEffects
from dps_lens.work import Engine, Run, RunConfig

_MAX_ATTENTION = 4_000_000
"""Head × token values of attention that a page may hold, a byte each; above, the best heads of every family only."""
_MANY_USERS, _MOST_USERS = 30, 120
_SHARE_OF_TOP = 30


def explore(
    model: HookedModel,
    users: Sequence[User],
    scores: HeadScores | Mapping[str, HeadScores],
    *,
    families: Mapping[str, HeadScores | FoundHeads] | None = None,
    effects: SetEffects | None = None,
    cost: SetEffects | None = None,
    k: int = 10,
    gammas: Sequence[float] = (0.5, 1.0, 2.0),
    ks: Sequence[int] = (5, 10),
    max_users: int = 6,
    max_new_tokens: int | None = None,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> Exploration:
    """Collect a page of a run: its maps, and attention and steered texts of some held-out examples.

    Args:
        model: the model that was scored.
        users: the newest evaluation example of up to `max_users` of them, spread over all, is shown.
        scores: of `score_heads`; or several by name, of the same users: the page is about the first, and its map can
            be switched to the others, such as the paper's PCS.
        families: of `reference_heads`, where a family that the model does not show is named with its reason, or sets
            of `find_heads`, which are shown by what the finder ranked by. The first of these sets is outlined, and
            texts are steered with it, each user's with the heads that others chose.
        effects: of `ablation_curve` or `patch_heads`.
        cost: of `ablation_cost`; where no set was found, its heads are outlined, if all users were tested with them.
        k: the top heads to compare, and to outline where there are no others.
        gammas: grid of the slider.
        ks: grid of the other slider; of a set that was found, at most its size.
        max_users: with attention and texts; 0 makes a page of maps and measures only.
        max_new_tokens: of a text; by default what the task needs.
        out: a folder, where finished examples are kept; a call that is started again resumes.
        engine: as in `score_heads`.
        run_config: force, progress bars.

    Raises:
        ScoreError: none of the users has an evaluation example, heads were chosen on one that would be shown, or the
            scores or maps are of another model, or maps of other users.
        HeadError: the model has fewer heads than asked for.
    """
    described = describe_model(model)
    shape = (described["n_layers"], described["n_heads"])
    scores, maps = _main_and_others(scores)
    if tuple(scores.values.shape[1:]) != shape:
        raise ScoreError(f"explore: scores of {tuple(scores.values.shape[1:])} heads, the model has {shape}")
    check_whole(ScoreError, "explore: max_users", max_users, least=0)
    shown = [user for user in users if user.examples]
    shown = shown[:: max(1, len(shown) // max(1, max_users))][:max_users]
    if max_users and not shown:
        raise ScoreError("explore: none of the users has an evaluation example to show")
    shown_families = {name: _as_map(one) for name, one in (families or {}).items()}
    found = next((one for one in (families or {}).values() if isinstance(one, FoundHeads)), None)
    heads = found.heads if found is not None else _tested(cost) or scores.top(k)
    config = PromptConfig(**scores.manifest.get("prompt_config", {}))
    check_held_out("explore", scores, [user.examples[-1] for user in shown])
    if found is not None:
        check_held_out("explore", found, [user.examples[-1] for user in shown])
    grid: SteeringGrid | None = None
    views: tuple[ExampleView, ...] = ()
    if shown:
        source = steered_by(scores, found, shown, max(ks))
        # Of scores of one user, the top is taken that was asked for.
        most = most_of(source) if found is not None else None
        grid = steering_grid(
            model,
            shown,
            source,
            gammas=gammas,
            ks=ks if most is None else [min(k, most) for k in ks],
            max_new_tokens=max_new_tokens,
            prompt_config=config,
            out=Path(out) / "grid" if out is not None else None,
            engine=engine,
            run_config=run_config,
        )
        looked = _looked_at(scores, shown_families, shape, len(shown) * config.profile_tokens * 2)
        # Those that are tested come first: they are kept token by token.
        looked = heads | looked
        run = Run(model, None, Path(out) / "attention" if out is not None else None, engine, run_config)
        views = ViewWork(model, shown, looked, len(heads), config).views(run)
    # Of a found set, overlap is about the set, not about what the finder ranked by.
    defined = {name: (families or {})[name] for name, family in shown_families.items() if family.defined}
    return Exploration(
        scores=scores,
        heads=heads,
        families=shown_families,
        maps=maps,
        between_users=_between_users(scores, k),
        between_families=overlap({"preference": scores, **defined}, k=k) if defined else None,
        effects=effects,
        cost=cost,
        views=views,
        grid=grid,
        found=found,
    )


def _as_map(family: HeadScores | FoundHeads) -> HeadScores:
    """A family as a map of scores: of heads that were found, what the finder ranked by."""
    if isinstance(family, HeadScores):
        return family
    about = {"family": "found", "unit": "what the finder ranked by", "call": "find_heads"}
    return HeadScores(family.values[None], example_ids=["all"], user_ids=["all"], manifest=about)


def _main_and_others(scores: HeadScores | Mapping[str, HeadScores]) -> tuple[HeadScores, dict[str, HeadScores]]:
    """The scores that the page is about, and those that its map can be switched to."""
    if isinstance(scores, HeadScores):
        return scores, {}
    if not scores:
        raise ScoreError("explore: there are no scores")
    main, *others = scores.items()
    for name, other in others:
        if other.users != main[1].users or other.values.shape[1:] != main[1].values.shape[1:]:
            raise ScoreError(f"explore: scores {name!r} are of other users or another model than {main[0]!r}")
    return main[1], dict(others)


def _tested(cost: SetEffects | None) -> HeadSet | None:
    """The heads that all users were tested with; sets that differ from user to user, as of folds, are no one set."""
    sets = list(cost.sets().values()) if cost is not None else []
    return sets[0] if sets and len({*map(str, sets)}) == 1 else None


def ranked_by(scores: HeadScores, k: int) -> HeadScores | HeadSet:
    """Scores, by which other users choose a user's heads; the heads themselves where there is one user only."""
    return scores if len(scores.users) > 1 else scores.top(k)


def steered_by(
    scores: HeadScores, found: FoundHeads | None, users: Sequence[User], k: int
) -> HeadScores | FoundHeads | HeadSet:
    """What users' texts are steered with: scores, or a set that was found, of fits without the user where there are."""
    if found is None:
        return ranked_by(scores, k)
    return found if found.folds or not {user.id for user in users} & {*found.users} else found.heads


def most_of(source: HeadScores | FoundHeads | HeadSet) -> int | None:
    """How many heads can be asked of it; None of scores, which rank all."""
    return source.k if isinstance(source, FoundHeads) else len(source) if isinstance(source, HeadSet) else None


def ranked_for(shown: Exploration, users: Sequence[User]) -> dict[str, HeadSet]:
    """What each user's texts are steered with, best heads first: the set that was found, or all heads."""
    total = shown.scores.values[0].numel()
    source = steered_by(shown.scores, shown.found, users, total)
    ranked = rankings("explore", {"heads": source}, users, (most_of(source) or total,))[0]["heads"]
    return {user: sets[0] for user, sets in ranked.items()}


def _between_users(scores: HeadScores, k: int) -> Overlap | None:
    n = len(scores.users)
    if not 2 <= n <= _MOST_USERS:
        return None
    many = n > _MANY_USERS
    return overlap(scores, k=k, n_null=100 if many else 1000, n_splits=10 if many else 100)


def _looked_at(scores: HeadScores, families: Mapping[str, HeadScores], shape: tuple[int, int], tokens: int) -> HeadSet:
    """All heads, or the best of every family where a page could not hold them all."""
    everything = HeadSet([(layer, head) for layer in range(shape[0]) for head in range(shape[1])])
    if len(everything) * tokens <= _MAX_ATTENTION:
        return everything
    best = scores.top(_SHARE_OF_TOP)
    for family in families.values():
        if family.defined:
            best = best | family.top(_SHARE_OF_TOP)
    return best
