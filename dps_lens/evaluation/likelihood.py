"""How steering moves the probability of users' own text: rules × strengths, teacher-forced, at equal KL."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from dps_lens.data import PromptConfig, User
from dps_lens.errors import SteeringError
from dps_lens.evaluation.steered import SweepWork
from dps_lens.evaluation.sweep import SteeringSweep, random_of
from dps_lens.literals import Select
from dps_lens.selection import HeadSource
from dps_lens.steering.rules import Rule, RuleLike, apart, find_rule
from dps_lens.steering.vector import Vector
from dps_lens.validation.work import HeldOutConfig
from dps_lens.work import Engine, Run, RunConfig

if TYPE_CHECKING:
    from dps_lens.model import HookedModel

Vectors: TypeAlias = Mapping[str, Vector]

SweepMethod: TypeAlias = RuleLike | tuple[RuleLike, HeadSource | Vectors | tuple[Vectors, HeadSource]]
"""A rule, such as `"cad"`; a rule of heads with its heads, `("dps", scores)`; `("vector", {user: vector})` or
`("head_vector", head_vectors(…))`; or both, `("head_vector+dps", (head_vectors(…), scores))`."""


def steering_sweep(
    model: "HookedModel",
    users: Sequence[User],
    methods: Mapping[str, SweepMethod],
    *,
    strengths: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0),
    k: int = 10,
    n_random: int = 8,
    select: Select | Mapping[str, Select] = "global",
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    held_out_config: HeldOutConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> SteeringSweep:
    """NLL of the users' own held-out text, or another objective, under rules of `generate`, and how hard each steers.

    Teacher-forced: a set of heads runs once for all strengths (beside a vector, and `amplify`: once each), and with
    `positions="response"` the prompt once for all sets.
    Methods are compared at equal KL with `.at_kl`, because a strength means something else in every rule.

    Args:
        model: a hooked model.
        users: their evaluation examples are used.
        methods: name → rule, or rule and heads (a family as in `ablation_curve`):
            `{"dps": ("dps", scores), "cad": "cad"}`; `vector` takes a vector a user, a vector stacked
            with a rule of heads both, `("head_vector+dps", (vectors, scores))`. `dola` is `log p − strength ·
            log p_j`, with nothing ruled out, so that the NLL is finite.
        strengths: positive, ascending: γ, α (both, for stacked rules), or the cap of an adaptive strength.
        k: heads of each set.
        n_random: layer-matched random sets of every method with heads, spread over a user's examples.
        select: as in `ablation_curve`; method → either, or one for all.
        max_examples: the newest so many evaluation examples of each user.
        prompt_config: how prompts are built; by default as for the scores.
        held_out_config: `exclude`; `weighted`, methods whose heads are edited in proportion to their score;
            `positions`, where heads are edited (`"response"` by default); `on="discovery"`, to choose strengths
            (`.choose(method)`): heads of scores are then those of users in other folds, and head vectors those of the
            user's other examples; `objective`, `"nll"`, `"pair"` or `"choice"`, the NLL where none is given.
        seed: of folds and random sets.
        out: a run folder; a run that is started again there resumes.
        engine: as in `score_heads`.
        run_config: force, progress bars.

    Raises:
        SteeringError: a rule is unknown or lacks its heads or vectors, or vectors meet other positions than the
            response; a weighted method has no scores, or a rule (`decore`) that has no parts; an objective of your own.
        ScoreError: scores were measured on one of these examples, or at other positions; an example has no rejected
            answer to compare with.
    """
    if not strengths or min(strengths) <= 0 or list(strengths) != sorted({*strengths}):
        raise SteeringError(f"steering_sweep: strengths {list(strengths)} are not positive and ascending")
    config = held_out_config or HeldOutConfig()
    config = replace(config, positions=config.positions or "response")
    rules, families, vectors = _taken_apart(methods)
    run = Run(model, SteeringSweep, out, engine, run_config)
    work = SweepWork.of(
        "steering_sweep",
        model,
        users,
        families,
        (k,),
        prompt_config=prompt_config,
        config=config,
        n_random=n_random,
        select=select,
        max_examples=max_examples,
        seed=seed,
        optional=True,
        rules=rules,
        vectors=vectors,
        strengths=tuple(strengths),
    )
    run.open(work.fingerprint)
    units = run.units(work, list(work.by_key), "steering")
    made, examples = list(units.made.values()), [work.by_key[key] for key in units.made]
    names = [label for name in methods for label in (name, random_of(name)) if f"change.{label}" in made[0]]
    return run.keep(
        SteeringSweep(
            tuple(strengths),
            tuple(example.user_id for example in examples),
            tuple(example.id for example in examples),
            torch.stack([unit["nll"] for unit in made]),
            {name: torch.stack([unit[f"change.{name}"] for unit in made], dim=1) for name in names},
            {name: torch.stack([unit[f"kl.{name}"] for unit in made], dim=1) for name in names},
            run.manifest,
        )
    )


def _taken_apart(
    methods: Mapping[str, SweepMethod],
) -> tuple[dict[str, Rule], dict[str, Any], dict[str, Mapping[str, Vector]]]:
    """Rules by method, and their heads or vectors.

    Raises:
        SteeringError: a rule is unknown, or what it needs was not given.
    """
    rules: dict[str, Rule] = {}
    families: dict[str, Any] = {}
    vectors: dict[str, Any] = {}
    for name, method in methods.items():
        asked, given = apart(method)
        rule = rules[name] = find_rule(asked)
        if rule.needs_vectors and rule.needs_heads:
            if not (isinstance(given, tuple) and len(given) == 2):
                raise SteeringError(
                    f"steering_sweep: the rule of method {name!r} needs vectors and heads, such as "
                    f"({rule.name!r}, (head_vectors(model, users, heads), scores))"
                )
            vectors[name], families[name] = given
            _check_vectors(name, vectors[name], rule)
            continue
        if rule.takes_gamma != (given is not None):
            wanted = "needs heads, such as ('dps', scores)" if rule.needs_heads else "takes no heads"
            if rule.needs_vectors:
                wanted = "needs a vector a user, ('vector', {user.id: style_vector(model, user)})"
                if rule.has("heads_shifted"):
                    wanted = "needs a vector a user, ('head_vector', head_vectors(model, users, heads))"
            raise SteeringError(f"steering_sweep: the rule of method {name!r} {wanted}")
        if given is not None:
            (vectors if rule.needs_vectors else families)[name] = given
        if rule.needs_vectors:
            _check_vectors(name, given, rule)
    return rules, families, vectors


def _check_vectors(name: str, given: object, rule: Rule) -> None:
    if not isinstance(given, Mapping):
        such = "(rule, (vectors, scores))" if rule.needs_heads else "(rule, vectors)"
        raise SteeringError(
            f"steering_sweep: method {name!r} has a {type(given).__name__} in the place of the users' vectors; give "
            f"{such}, vectors being head_vectors(…), or a dict of user ids"
        )
