"""Preference Contribution Scores of every head (PCS, arXiv 2604.22345)."""

from collections.abc import Sequence
from pathlib import Path

from dps_lens.data import Discovery, PromptConfig, User
from dps_lens.intervene import Ablation, Positions
from dps_lens.model import HookedModel
from dps_lens.runs import Engine, RunFolder, make_units
from dps_lens.scores import HeadScores
from dps_lens.scoring.branches import BatchSize
from dps_lens.scoring.sweep import Contrast, Direction, Method, Sweep


def score_heads(
    model: HookedModel,
    users: Sequence[User],
    *,
    contrast: Contrast | None = "no_profile",
    ablation: Ablation = "zero",
    positions: Positions = "response",
    method: Method = "exact",
    exact_layers: int = 2,
    confirm: float = 0.15,
    discovery: Discovery = "history",
    max_examples: int | None = None,
    prompt: PromptConfig | None = None,
    patch_from: Contrast = "no_profile",
    direction: Direction = "noising",
    n_donors: int = 3,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    out: str | Path | None = None,
    force: bool = False,
    engine: Engine | None = None,
    progress: bool = True,
) -> HeadScores:
    """Score every head of a model on the discovery examples of users.

    The paper's score of head (l, h) is `PCS = NLL(head ablated) − NLL`, on the response, in nats per
    token. It also rewards heads that matter for any text. The profile-specific score, the default,
    subtracts the same difference for the same task and response without the user's profile; it equals
    the part of the personalisation gain `NLL(no profile) − NLL(own profile)` that the ablation takes.

    Args:
        model: a hooked model.
        users: their discovery examples are used, never their evaluation examples (but see `discovery`).
        contrast: `"no_profile"`, `"other_user"` (mean over `n_donors` other users' profiles) or None for
            the paper's PCS.
        ablation: `"zero"`, `"mean"` (per head, over the edited positions of these examples, for each
            prompt condition on its own), `"patch"` or `"uniform"`.
        positions: `"response"` (from the last prompt token on), `"all"` or `"profile"`.
        method: `"exact"`: one branch a head. `"attribution"`: first-order estimates of all heads from one
            forward and one backward. `"screened"`: the earliest layers and the heads of largest estimate are
            measured exactly, the rest keeps its estimate; `scores.exact` says which is which. On real
            headlines the defaults found 94% (response positions) and 91% (all positions) of each exact top 20
            at a third of the cost or less.
        exact_layers: for `"screened"`, layers that are always exact.
        confirm: for `"screened"`, share of all heads that estimates may choose beyond these layers.
        discovery: `"history"`, or `"labelled"` for tasks whose histories hold no pairs; then evaluate on
            other users.
        max_examples: the newest so many discovery examples of each user.
        prompt: how prompts are built.
        patch_from: for `"patch"`, the counterfactual prompt: without profile, or with another user's.
        direction: for `"patch"`: `"noising"` puts the counterfactual run's z into the profile run;
            `"denoising"` the reverse, and the score is the recovered log-probability.
        n_donors: other users for `"other_user"`, drawn with `seed`.
        batch_size: branches a batch; `"auto"` chooses by device.
        out: a run folder; a run that is started again there resumes.
        force: drop what `out` holds.
        engine: `RayEngine(…)` makes the examples' units on many machines, `Shard(i, n)` makes a part of them.
        progress: show a progress bar.

    Returns:
        scores with `components` and the NLL of the unablated model in every condition.

    Raises:
        ScoreError: the settings do not fit together, or a user has no discovery example.
        RunError: `out` holds a run with other settings, or an engine could not make one unit.
    """
    if engine is not None:
        engine.start(model)
    sweep = Sweep(
        model,
        list(users),
        method=method,
        exact_layers=exact_layers,
        confirm=confirm,
        contrast=contrast,
        ablation=ablation,
        positions=positions,
        discovery=discovery,
        max_examples=max_examples,
        prompt=prompt or PromptConfig(),
        patch_from=patch_from,
        direction=direction,
        n_donors=n_donors,
        seed=seed,
        batch_size=batch_size,
    )
    folder = RunFolder(out, sweep.fingerprint(), force=force) if out is not None else None
    sweep = sweep.with_means(engine, progress)
    found = make_units(sweep, list(sweep.by_key), folder=folder, engine=engine, what="scoring heads", progress=progress)
    scores = sweep.collect(found, engine)
    if out is not None:
        scores.save(out)
    return scores
