"""A language model as the judge of answers: pairwise, blinded, in both orders."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from warnings import warn

import numpy as np
import pandas as pd

from dps_lens.data import Example, User
from dps_lens.data.retrieval import retrieve
from dps_lens.errors import EvaluationError
from dps_lens.evaluation.endpoint import BudgetError, Endpoint
from dps_lens.evaluation.result import REFERENCE, Evaluation
from dps_lens.files import parse_json
from dps_lens.progress import progress_bar
from dps_lens.result import Result
from dps_lens.stats.intervals import interval
from dps_lens.work import RunConfig

CRITERIA = {
    "relevance": "which answer does what the task asks for",
    "fluency": "which answer reads better",
    "style": "which answer is written as the earlier texts are",
    "profile": "which answer fits better to what the earlier texts tell about their author",
    "factuality": "which answer claims less that the task does not support",
}
STATED = ("preferences", "sessions", "pairs", "choices")
"""Tasks whose profiles say, or show by what was chosen, what a user wants."""
ADHERENCE = {"adherence": "which answer keeps to what the person is known to want"}
"""Asked in these tasks, beside `CRITERIA`."""
_SYSTEM = "You compare two answers to a task. You reply with one JSON object and nothing else."
_ASK = """{header}
{texts}

Task:
{task}

Answer A:
{a}

Answer B:
{b}

Say for every criterion which answer is better: "A", "B" or "tie".
{criteria}

Reply with {form}"""
_AGAIN = 'That was not the JSON object that was asked for. Reply with {form}, every value "A", "B" or "tie".'
_SHOWN_CHARACTERS = 400


@dataclass(frozen=True, eq=False, repr=False)
class Verdicts(Result):
    """What a judge thinks of methods against a baseline.

    Attributes:
        rows: one row a criterion, pair of answers and order: `user`, `example`, `method`, `criterion`, `first` (1 where
            the method's answer was shown first), `verdict` (1 the method's, −1 the baseline's, 0 a tie, NaN where the
            judge gave no valid reply), `asked` (False for equal answers, a tie without a call).
        unfinished: pairs that the budget did not reach.
        manifest: settings.
    """

    stem: ClassVar[str] = "verdicts"
    error: ClassVar[type[EvaluationError]] = EvaluationError

    rows: pd.DataFrame
    unfinished: int
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        return f"{len(self.rows)} verdicts of {self.manifest.get('judge')!r}, {self.unfinished} pairs unfinished"

    def to_frame(self, level: float = 0.95) -> pd.DataFrame:
        """One row a method and criterion: `mean` verdict with its interval over users (1: the method always wins, −1:
        the baseline does); of the pairs that were asked about, `agreement` (share on which both orders agree) and
        `invalid` (share of replies)."""
        table = []
        for (method, criterion), rows in self.rows.groupby(["method", "criterion"], sort=False):
            pairs = rows.pivot_table(index=["user", "example"], columns="first", values="verdict", dropna=False)
            both = pairs.dropna()
            users = both.mean(axis=1).groupby("user", sort=False).mean().to_numpy()
            row = {"method": method, "criterion": criterion}
            row |= interval(users, level) if len(users) else dict.fromkeys(("mean", "low", "high"), float("nan"))
            asked = rows[rows["asked"]]
            two = asked.pivot_table(index=["user", "example"], columns="first", values="verdict", dropna=False).dropna()
            agreement = float((two[0] == two[1]).mean()) if len(two) else float("nan")
            invalid = float(asked["verdict"].isna().mean()) if len(asked) else float("nan")
            table.append(row | {"agreement": agreement, "invalid": invalid})
        return pd.DataFrame(table)

    def position_bias(self, level: float = 0.95) -> dict[str, float]:
        """Mean verdict for whichever answer was shown first, with its interval over users; 0 for a fair judge."""
        rows = self.rows[self.rows["asked"]].dropna(subset="verdict")
        if rows.empty:
            return dict.fromkeys(("mean", "low", "high"), float("nan"))
        for_first = rows["verdict"] * np.where(rows["first"] == 1, 1, -1)
        return interval(for_first.groupby(rows["user"], sort=False).mean().to_numpy(), level)


def judge(
    evaluation: Evaluation,
    users: Sequence[User],
    endpoint: Endpoint,
    *,
    against: str = "rag",
    methods: Sequence[str] | None = None,
    criteria: Mapping[str, str] | None = None,
    documents: int = 6,
    attempts: int = 3,
    seed: int = 0,
    run_config: RunConfig | None = None,
) -> Verdicts:
    """Let a language model compare every method's answers with a baseline's.

    Each pair is judged twice, either answer first, without names. Pairs come in random order, so that a budget that
    runs out leaves a sample of all methods. Equal answers are a tie and cost nothing.

    Args:
        evaluation: the answers.
        users: who were evaluated; their tasks and earlier texts are shown.
        endpoint: the judge; the budget is its `max_calls`.
        against: the baseline.
        methods: all others by default; `"reference"` (what the user wrote) is one if named.
        criteria: name → what the judge is asked; `CRITERIA` by default, and `ADHERENCE` where the profile states
            preferences or shows choices.
        documents: earlier texts that are shown, by retrieval, 400 characters each.
        attempts: until a reply that is not valid counts as none.
        seed: of the order.
        run_config: progress bars.

    Raises:
        EvaluationError: a method is not in the evaluation, or the endpoint fails; its answers so far are kept, and the
            same call goes on from there.
    """
    asked = dict(criteria or CRITERIA | (ADHERENCE if evaluation.task.name in STATED else {}))
    chosen = [m for m in evaluation.methods if m not in (against, REFERENCE)] if methods is None else list(methods)
    for name in (*chosen, against):
        if name not in evaluation.methods:
            raise EvaluationError(f"judge: {name!r} is not among {', '.join(evaluation.methods)}")
    texts = evaluation.rows.set_index(["user", "example", "method"])["text"]
    examples = {(user.id, example.id): example for user in users for example in user.examples}
    pairs = [(*key, method) for key in dict.fromkeys(texts.index.droplevel("method")) for method in chosen]
    if missing := [key for *key, _ in pairs if tuple(key) not in examples]:
        raise EvaluationError(f"judge: example {missing[0][1]!r} of user {missing[0][0]!r} is not among the users")
    random.Random(f"judge|{seed}").shuffle(pairs)
    rows: list[dict[str, Any]] = []
    unfinished = 0
    bar = progress_bar(pairs, desc="judging", unit="pair", shown=(run_config or RunConfig()).progress)
    for number, (user, example, method) in enumerate(bar):
        own, other = texts[user, example, method], texts[user, example, against]
        try:
            found = list(_both_orders(endpoint, examples[user, example], own, other, asked, documents, attempts))
        except BudgetError as error:
            warn(str(error), stacklevel=2)
            unfinished = len(pairs) - number
            break
        about = {"user": user, "example": example, "method": method}
        rows += [about | one for one in found]
    manifest = {"judge": endpoint.model, "against": against, "criteria": asked, "documents": documents, "seed": seed}
    columns = ["user", "example", "method", "criterion", "first", "asked", "verdict"]
    return Verdicts(pd.DataFrame(rows, columns=columns), unfinished, manifest)


def _both_orders(
    endpoint: Endpoint,
    example: Example,
    own: str,
    other: str,
    criteria: Mapping[str, str],
    documents: int,
    attempts: int,
) -> Iterator[dict[str, Any]]:
    for first in (1, 0):
        if own == other:
            verdicts: Mapping[str, str | None] = dict.fromkeys(criteria, "tie")
        else:
            a, b = (own, other) if first else (other, own)
            verdicts = _ask(endpoint, _question(example, a, b, criteria, documents), criteria, attempts)
        worth: dict[str | None, float] = {"A": 1.0, "B": -1.0, "tie": 0.0, None: float("nan")}
        for criterion, verdict in verdicts.items():
            value = worth[verdict]
            signed = value if first or not value else -value
            yield {"criterion": criterion, "first": first, "asked": own != other, "verdict": signed}


def _question(example: Example, a: str, b: str, criteria: Mapping[str, str], documents: int) -> str:
    shown = retrieve(example.showable, example.task.query(example.input), documents, task=example.task)
    texts = ["- " + "".join(example.task.parts(document.fields))[:_SHOWN_CHARACTERS] for document in shown]
    listed = "\n".join(f"- {name}: {meaning}" for name, meaning in criteria.items())
    return _ASK.format(
        header="Earlier texts of the person who asks:" if example.task.name not in STATED else example.task.header,
        texts="\n".join(texts),
        task=example.input.strip(),
        a=a,
        b=b,
        criteria=listed,
        form=_form(criteria),
    )


def _form(criteria: Mapping[str, str]) -> str:
    return json.dumps(dict.fromkeys(criteria, "A"))


def _ask(endpoint: Endpoint, question: str, criteria: Mapping[str, str], attempts: int) -> Mapping[str, str | None]:
    """A verdict for every criterion; None for all where no reply is valid."""
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": question}]
    for _ in range(attempts):
        reply = endpoint.ask(messages)
        if (found := read_reply(reply, criteria)) is not None:
            return found
        if reply:
            messages += [
                {"role": "assistant", "content": reply},
                {"role": "user", "content": _AGAIN.format(form=_form(criteria))},
            ]
    return dict.fromkeys(criteria)


def read_reply(reply: str, criteria: Mapping[str, str]) -> Mapping[str, str] | None:
    """The verdicts in a reply, or None where it holds no valid object; text around the object does no harm."""
    begin, end = reply.find("{"), reply.rfind("}")
    try:
        found = parse_json(reply[begin : end + 1], "reply", EvaluationError)
    except EvaluationError:
        return None
    if not isinstance(found, dict) or any(found.get(name) not in ("A", "B", "tie") for name in criteria):
        return None
    return {name: found[name] for name in criteria}
