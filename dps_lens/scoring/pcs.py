"""Scores of every head: what it contributes to the likelihood of the user's own text."""

from collections.abc import Sequence
from pathlib import Path

from dps_lens.data import PromptConfig, User
from dps_lens.intervene import AblationLike, find_ablation
from dps_lens.literals import Positions, ScoreAgainst, ScoreMethod
from dps_lens.model import HookedModel
from dps_lens.scores import HeadScores
from dps_lens.scoring.objectives import ObjectiveLike, find_objective
from dps_lens.scoring.sweep import ScoreConfig, Sweep
from dps_lens.work import Engine, Run, RunConfig


def score_heads(
    model: HookedModel,
    users: Sequence[User],
    *,
    ablation: AblationLike = "patch",
    against: ScoreAgainst | None = "other_user",
    objective: ObjectiveLike | None = None,
    positions: Positions = "response",
    method: ScoreMethod = "integrated",
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    score_config: ScoreConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> HeadScores:
    """Score every head of a model on the discovery examples of users.

    By default a head's score is what it carries of the difference between the user's own profile and another user's,
    on the same task and response: z of all heads goes from the run with the own profile to the run with the other's,
    and the change of NLL along that path is shared out among the heads by integrated gradients. The scores add up to
    what patching all heads changes, in nats per token: the gain `NLL(other user) − NLL(own profile)`, but for learned
    absolute positions, which differ between prompts of unequal length. A head whose output does not depend on the
    profile scores 0.

    The paper's PCS (arXiv 2604.22345), `NLL(head ablated) − NLL`, is
    `ablation="zero", against=None, method="exact"`. It also rewards heads that any text needs; against="no_profile"
    subtracts the same difference for the same task without the profile.

    Args:
        model: a hooked model.
        users: their discovery examples are used, never their evaluation examples (but see `ScoreConfig.discovery`).
        ablation: `"patch"` (z of the counterfactual run, or with `Patch(direction="denoising")` the reverse, which
            scores the recovered log-probability), `"zero"`, `"mean"` (per head, over the edited positions of these
            examples, for each prompt condition on its own), `"uniform"`, or an `Ablation` of your own.
        against: what the own profile is compared with: `"other_user"` (mean over other users' profiles of equal
            budget), `"no_profile"`, `"both"` (mean of the two), `"other_user-no_profile"` (what is lost towards a
            stranger beyond what is lost towards nobody), `"no_profile-other_user"`, or None for the paper's PCS. For
            `"patch"`, the counterfactual run.
        objective: what a score is a change of: `"nll"` of the response; `"pair"`, how much less likely the user's own
            answer is than the rejected one, so that what any text needs cancels; `"choice"` among the answers of the
            example; or an `Objective` object, such as `Pair(per_token=False)`, or one of your own.
        positions: `"response"` (from the last prompt token on), `"all"` or `"profile"`.
        method: `"integrated"`: all heads at once along the path, `ScoreConfig.ig_steps` rows of one forward and
            backward; `scores.gap` says how far their sum misses the whole change. `"exact"`: one ablated run a head,
            which does not see heads that back each other up. `"attribution"`: first-order estimates from one
            forward and one backward. `"screened"`: the earliest layers and the heads of largest estimate are measured
            exactly, the rest keeps its estimate, integrated for patches, else first-order; `scores.exact` says which
            is which. On real headlines the defaults found 94% (response positions) and 91% (all positions) of each
            exact top 20 of zero ablation at a third of the cost or less.
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
        objective=find_objective(objective),
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
