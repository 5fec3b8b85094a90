"""Preference Contribution Scores of every head (PCS, arXiv 2604.22345)."""

from collections.abc import Sequence
from pathlib import Path

from dps_lens.data import PromptConfig, User
from dps_lens.intervene import AblationLike, find_ablation
from dps_lens.literals import Against, Positions, ScoreMethod
from dps_lens.model import HookedModel
from dps_lens.scores import HeadScores
from dps_lens.scoring.objectives import NLL, Objective
from dps_lens.scoring.sweep import ScoreConfig, Sweep
from dps_lens.work import Engine, Run, RunConfig


def score_heads(
    model: HookedModel,
    users: Sequence[User],
    *,
    ablation: AblationLike = "zero",
    against: Against | None = "no_profile",
    objective: Objective | None = None,
    positions: Positions = "response",
    method: ScoreMethod = "exact",
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    score_config: ScoreConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> HeadScores:
    """Score every head of a model on the discovery examples of users.

    The paper's score of head (l, h) is `PCS = NLL(head ablated) − NLL`, on the response, in nats per
    token. It also rewards heads that matter for any text. The profile-specific score, the default,
    subtracts the same difference for the same task and response without the user's profile; it equals
    the part of the personalisation gain `NLL(no profile) − NLL(own profile)` that the ablation takes.

    Args:
        model: a hooked model.
        users: their discovery examples are used, never their evaluation examples (but see `ScoreConfig.discovery`).
        ablation: `"zero"`, `"mean"` (per head, over the edited positions of these examples, for each
            prompt condition on its own), `"patch"` (z of the counterfactual run, or with
            `Patch(direction="denoising")` the reverse, which scores the recovered log-probability), `"uniform"`, or an
            `Ablation` of your own.
        against: `"no_profile"`, `"other_user"` (mean over other users' profiles) or None for the paper's PCS. For
            `"patch"`, the counterfactual run.
        objective: what a score is a change of; the NLL of the response by default.
        positions: `"response"` (from the last prompt token on), `"all"` or `"profile"`.
        method: `"exact"`: one ablated run a head. `"attribution"`: first-order estimates of all heads from one
            forward and one backward. `"screened"`: the earliest layers and the heads of largest estimate are
            measured exactly, the rest keeps its estimate; `scores.exact` says which is which. On real
            headlines the defaults found 94% (response positions) and 91% (all positions) of each exact top 20
            at a third of the cost or less.
        max_examples: the newest so many discovery examples of each user.
        prompt_config: how prompts are built.
        score_config: rare settings.
        seed: of the other users that are drawn.
        out: a run folder; a run that is started again there resumes.
        engine: `RayEngine(…)` makes the examples' units on many machines, `Shard(i, n)` makes a part of them.
        run_config: force, rows of a batch, progress bars.

    Returns:
        scores with `components` and the NLL of the unablated model in every condition.

    Raises:
        ScoreError: the settings do not fit together, or no user has a discovery example.
        RunError: `out` holds a run with other settings, or an engine could not make one unit.
    """
    run = Run(model, HeadScores, out, engine, run_config)
    sweep = Sweep(
        model,
        list(users),
        ablation=find_ablation(ablation),
        against=against,
        objective=objective or NLL(),
        positions=positions,
        method=method,
        max_examples=max_examples,
        prompt_config=prompt_config or PromptConfig(),
        config=score_config or ScoreConfig(),
        seed=seed,
        batch_size=run.config.batch_size,
    )
    run.open(sweep.fingerprint)
    sweep = sweep.with_means(run)
    units = run.units(sweep, list(sweep.by_key), "scoring heads")
    return run.keep(sweep.collect(units, run.manifest))
