"""What `evaluate` refuses before anything is computed."""

from typing import TYPE_CHECKING

from dps_lens.analysis.ablation import check_held_out
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.metrics import check_reference
from dps_lens.evaluation.result import REFERENCE
from dps_lens.scores import HeadScores
from dps_lens.steering.tuning import check_tunable

if TYPE_CHECKING:
    from dps_lens.evaluation.bench import Bench


def check_bench(bench: "Bench") -> None:
    """Raise an error where methods, users and settings do not fit together."""
    if not bench.users or not bench.methods:
        raise EvaluationError("evaluate: give at least one user and one method")
    limits = (bench.max_examples, bench.max_new_tokens, bench.vector_examples)
    if bench.choose_on < 0 or any(limit is not None and limit < 1 for limit in limits):
        raise EvaluationError(
            "evaluate: choose_on is not negative; max_examples, max_new_tokens and vector_examples are at least 1"
        )
    tasks = sorted({user.task.name for user in bench.users})
    if len(tasks) > 1:
        raise EvaluationError(f"evaluate: users of several tasks ({', '.join(tasks)}); evaluate one at a time")
    _check_methods(bench)
    _check_users(bench)


def _check_methods(bench: "Bench") -> None:
    if REFERENCE in bench.methods:
        raise EvaluationError(f"evaluate: {REFERENCE!r} is what the user wrote; call the method something else")
    for name, method in bench.methods.items():
        if method.adapter:
            check_tunable(f"evaluate: method {name!r}", bench.model)
        if not method.settings:
            raise EvaluationError(f"evaluate: method {name!r} has no setting; give a strength, K and layer")
        if len(method.settings) > 1 and not (bench.choose_on and bench.task.has_pairs):
            raise EvaluationError(
                f"evaluate: method {name!r} has several settings and nothing to choose them on "
                f"(choose_on={bench.choose_on}, task {bench.task.name}); give one strength, K and layer"
                + (", or raise choose_on" if bench.task.has_pairs else "")
            )
        outside = [one.layer for one in method.settings if one.layer not in (None, *range(bench.model.cfg.n_layers))]
        if outside:
            raise EvaluationError(
                f"evaluate: layer {outside[0]} is not in this model of {bench.model.cfg.n_layers} layers"
            )


def _check_users(bench: "Bench") -> None:
    methods = bench.methods.values()
    least = bench.choose_on * any(len(method.settings) > 1 for method in methods)
    least += any(method.made for method in methods)
    for user in bench.users:
        if not user.examples:
            raise EvaluationError(f"evaluate: user {user.id!r} has no evaluation example; leave the user out")
        if least and len(bench.discovery(user)) < least:
            raise EvaluationError(
                f"evaluate: user {user.id!r} has {len(bench.discovery(user))} discovery examples, {least} are "
                "needed; leave the user out"
            )
    for example in bench.examples:
        check_reference(example)
    for method in methods:
        if isinstance(method.family, HeadScores):
            check_held_out("evaluate", method.family, bench.examples)
