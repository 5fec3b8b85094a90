"""Everything that the page shows, collected once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.analysis import AblationCost, Overlap, SetEffects, attention_pattern, overlap, significant_heads
from dps_lens.analysis.ablation import check_held_out
from dps_lens.analysis.rankings import rankings
from dps_lens.analysis.significance import MIN_USERS
from dps_lens.data import PromptConfig, User, build_prompt
from dps_lens.errors import ScoreError
from dps_lens.evaluation import SteeringGrid, steering_grid
from dps_lens.files import write_text
from dps_lens.heads import Head, HeadSet
from dps_lens.model import HookedModel, describe_model
from dps_lens.runs import RunFolder, kept
from dps_lens.scores import HeadScores

_MAX_ATTENTION = 4_000_000
"""Head × token values of attention that a page may hold, a byte each; above, the best heads of every family only."""
_MANY_USERS, _MOST_USERS = 30, 120
_SHARE_OF_TOP = 30


@dataclass(frozen=True, eq=False)
class ExampleView:
    """What heads look at in one prompt.

    Attributes:
        user: who asks.
        example: its id.
        pieces: text of each token of the prompt and its response.
        spans: `"profile"`, `"task"` and `"response"`, `(start, stop)`.
        heads: whose attention is there.
        attention: mean over the positions that give the response.
    """

    user: str
    example: str
    pieces: tuple[str, ...]
    spans: dict[str, tuple[int, int]]
    heads: tuple[Head, ...]
    attention: Float[Tensor, "head pos"]


@dataclass(frozen=True)
class Exploration:
    """What `explore` collects for a page.

    Attributes:
        scores: of `score_heads`.
        heads: that are outlined and tested.
        families: reference families by name.
        between_users: overlap of the users' top heads, where there are at least two users.
        between_families: overlap of the families' top heads, where there are any.
        effects: of `ablation_curve`.
        cost: of `ablation_cost`.
        views: attention on some held-out examples.
        grid: steered texts.
        title: of the page.
    """

    scores: HeadScores
    heads: HeadSet
    families: dict[str, HeadScores] = field(default_factory=dict)
    between_users: Overlap | None = None
    between_families: Overlap | None = None
    effects: SetEffects | None = None
    cost: AblationCost | None = None
    views: tuple[ExampleView, ...] = ()
    grid: SteeringGrid | None = None
    title: str = "Preference Heads"

    def write(self, path: str | Path) -> Path:
        """Write one HTML file that opens without a network and runs no script but its own."""
        from dps_lens.explorer.page import page

        write_text(path, page(self))
        return Path(path)


def explore(
    model: HookedModel,
    users: Sequence[User],
    scores: HeadScores,
    *,
    families: Mapping[str, HeadScores] | None = None,
    effects: SetEffects | None = None,
    cost: AblationCost | None = None,
    k: int = 10,
    gammas: Sequence[float] = (0.5, 1.0, 2.0),
    ks: Sequence[int] = (5, 10),
    max_users: int = 6,
    max_new_tokens: int | None = None,
    title: str = "Preference Heads",
    out: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> Exploration:
    """Collect a page of a run: its maps, and attention and steered texts of some held-out examples.

    Args:
        model: the model that was scored.
        users: the newest evaluation example of up to `max_users` of them, spread over all, is shown.
        scores: of `score_heads`.
        families: of `reference_heads`; a family that the model does not show is named with its reason.
        effects: of `ablation_curve` or `patch_heads`.
        cost: of `ablation_cost`; its heads are outlined.
        k: the top heads to outline and compare.
        gammas: grid of the slider.
        ks: grid of the other slider.
        max_users: with attention and texts.
        max_new_tokens: of a text; by default what the task needs.
        title: of the page.
        out: a folder, where finished examples are kept; a call that is started again resumes.
        force: drop what `out` holds.
        progress: show progress bars.

    Raises:
        ScoreError: none of the users has an evaluation example, heads were chosen on one that would be shown, or the
            scores are of another model.
        HeadError: the model has fewer heads than asked for.
    """
    described = describe_model(model)
    shape = (described["n_layers"], described["n_heads"])
    if tuple(scores.values.shape[1:]) != shape:
        raise ScoreError(f"explore: scores of {tuple(scores.values.shape[1:])} heads, the model has {shape}")
    shown = [user for user in users if user.examples]
    shown = shown[:: max(1, len(shown) // max_users)][:max_users]
    if not shown:
        raise ScoreError("explore: none of the users has an evaluation example to show")
    families = dict(families or {})
    heads = cost.heads if cost is not None else scores.top(k)
    config = PromptConfig(**scores.manifest["prompt"]) if "prompt" in scores.manifest else PromptConfig()
    check_held_out("explore", scores, [user.examples[-1] for user in shown])
    grid = steering_grid(
        model, shown, chooser(scores, max(ks)), gammas=gammas, ks=ks, max_new_tokens=max_new_tokens, prompt=config,
        progress=progress, out=Path(out) / "grid" if out is not None else None, force=force,
    )  # fmt: skip
    looked = _looked_at(scores, families, shape, len(shown) * config.profile_tokens * 2)
    views = _views(model, shown, looked, config, Path(out) / "attention" if out is not None else None, force, progress)
    defined = {name: family for name, family in families.items() if family.defined}
    return Exploration(
        scores=scores,
        heads=heads,
        families=families,
        between_users=_between_users(scores, k),
        between_families=overlap({"preference": scores, **defined}, k=k) if defined else None,
        effects=effects,
        cost=cost,
        views=views,
        grid=grid,
        title=title,
    )


def chooser(scores: HeadScores, k: int) -> HeadScores | HeadSet:
    """Scores, by which other users choose a user's heads; the heads themselves where there is one user only."""
    return scores if len(scores.users) > 1 else scores.top(k)


def ranked_for(scores: HeadScores, users: Sequence[User], k: int) -> dict[str, HeadSet]:
    """The best `k` heads for each user."""
    found = rankings("explore", {"heads": chooser(scores, k)}, users, (k,))[0]["heads"]
    return {user: sets[0] for user, sets in found.items()}


def significant(scores: HeadScores) -> list[str]:
    """Names of the heads that a population of users shows; none for few users."""
    if len(scores.users) < MIN_USERS or not scores.defined:
        return []
    flips = 2000 if scores.values[0].numel() > 2000 else 10_000
    found = significant_heads(scores, n_flips=flips).significant
    return [str(Head(*at)) for at in found.nonzero().tolist()]


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
    found = scores.top(_SHARE_OF_TOP)
    for family in families.values():
        if family.defined:
            found = found | family.top(_SHARE_OF_TOP)
    return found


def _views(
    model: HookedModel,
    users: Sequence[User],
    heads: HeadSet,
    config: PromptConfig,
    out: Path | None,
    force: bool,
    progress: bool,
) -> tuple[ExampleView, ...]:
    asked = {"call": "attention", "heads": str(heads), "prompt": config.to_dict(), "model": describe_model(model)}
    folder = RunFolder(out, asked, force=force) if out is not None else None
    found = []
    for user in tqdm(users, desc="attention", unit="example", disable=None if progress else True):
        example = user.examples[-1]
        prompt = build_prompt(model, example, config=config)

        def look(prompt: Any) -> dict[str, Tensor]:
            return {"attention": attention_pattern(model, prompt, heads).mean}

        unit = kept(folder, f"attention|{example.user_id}|{example.id}", partial(look, prompt))
        pieces = tuple(model.tokenizer.decode([token]) for token in prompt.tokens.tolist())
        found.append(ExampleView(user.id, example.id, pieces, prompt.spans, tuple(heads), unit["attention"]))
    return tuple(found)
