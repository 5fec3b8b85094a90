"""Find the set of heads that carries what users' profiles bring."""

from collections.abc import Sequence
from pathlib import Path

from dps_lens.data import PromptConfig, User
from dps_lens.finding.finder import Bounds, Finder
from dps_lens.finding.finders import find_finder
from dps_lens.finding.work import FindConfig, FindWork
from dps_lens.found import FoundHeads
from dps_lens.literals import MAX_NEUTRAL_COST, MAX_TASK_COST, Counterfactual, FindMethod
from dps_lens.model import HookedModel
from dps_lens.work import Engine, Run, RunConfig


def find_heads(
    model: HookedModel,
    users: Sequence[User],
    k: int = 10,
    *,
    method: Finder | FindMethod = "gates",
    against: Counterfactual = "other_user",
    max_task_cost: float | None = MAX_TASK_COST,
    max_neutral_cost: float | None = MAX_NEUTRAL_COST,
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    find_config: FindConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> FoundHeads:
    """Find a set of at most `k` heads that carries what the users' own profiles bring, on their discovery examples.

    Heads back each other up, so that single heads say little of a set. What is looked for is the *set* whose z,
    patched from the run with another profile, takes most from the user's own text, and, patched into that run, brings
    most back; and whose removal costs little where there is no profile. Patching is at the response positions.

    The set is fitted to all users; once more without each of at most five folds of users, so that whoever tests the
    same users gives each the heads that others chose; and to resamples of users, which say how stable each head is.

    Args:
        model: a hooked model.
        users: their discovery examples are used, never their evaluation examples (but see `FindConfig.discovery`).
        k: at most so many heads; fewer where bounds allow no more, which a warning says, or no other head helps.
        method: `"gates"`: gates fitted by gradient, the bounds in the objective; on 95 people's texts the best of these
            within its bounds (docs/finders.md). `"rank"`: the top of the integrated scores, penalised by the integrated
            costs until the set keeps its bounds; the quickest, minutes on a CPU. `"greedy"`: forward selection of
            measured sets. `"conditional"`: the head whose effect is largest once the others are gone, for backups that
            hide each other. Or a `Finder` object, yours or one of these with settings, such as `Greedy(candidates=50)`.
        against: the counterfactual: `"other_user"` (other users' profiles), `"no_profile"`, or `"both"`.
        max_task_cost: bound on what zeroing the set costs on the same task without a profile, nats per token, mean
            over users; None for none. It holds for the set as a whole; harmless heads may cost something together.
        max_neutral_cost: the same on neutral text.
        max_examples: the newest so many discovery examples of each user.
        prompt_config: how prompts are built.
        find_config: rare settings: donors, resamples, folds, steps, neutral texts.
        seed: of donors, folds and resamples.
        out: a run folder; a run that is started again there resumes.
        engine: as in `score_heads`; shards each find the whole set.
        run_config: force, rows of a batch, progress bars.

    Returns:
        the set with inclusion frequencies, the sets of folds, and what it was measured to do.

    Raises:
        ScoreError: the settings do not fit together, no user has a discovery example, no set keeps the bounds, or a
            finder of your own broke them.
        HeadError: the model has fewer heads than `k`.
        RunError: `out` holds a run with other settings.
    """
    run = Run(model, FoundHeads, out, engine, run_config)
    work = FindWork(
        model,
        list(users),
        k,
        finder=find_finder(method),
        against=against,
        bounds=Bounds(max_task_cost, max_neutral_cost),
        max_examples=max_examples,
        prompt_config=prompt_config or PromptConfig(),
        config=find_config or FindConfig(),
        seed=seed,
        batch_size=run.config.batch_size,
    )
    run.open(work.fingerprint)
    return run.keep(work.run(run))
