"""Layouts of published sets of preferences.

PRISM (arXiv 2404.16019), PersonalLLM's interaction database (arXiv 2409.20296), PersonaMem (arXiv 2504.14225) and
PrefEval (arXiv 2502.09597).
"""

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dps_lens.data.asked import Asked, chosen_of, exchanges, profile_of, texts_of
from dps_lens.data.fields import Record, TooShortError
from dps_lens.data.same import normalised
from dps_lens.data.tasks import TASKS
from dps_lens.errors import DataError

Load: TypeAlias = Callable[[str | Path], tuple[str, list[Any]]]
"""Reads a second file: its name and its records."""

_EMPTY = "EMPTY STRING"  # how PRISM writes an answer that is none
_OPTION = re.compile(r"^\(([a-z])\)\s*", re.DOTALL)


def prism(undecided: list[Record], records: Sequence[Record]) -> list[Asked]:
    """PRISM's utterances: opening prompts with the answers of up to four models; those that show no choice become
    `undecided`."""
    by_interaction: dict[str, list[Record]] = {}
    for record in records:
        if record.field("turn", int) == 0:
            by_interaction.setdefault(str(record.field("interaction_id")), []).append(record)
    found = []
    for number, own in by_interaction.items():
        answers: dict[str, tuple[str, bool]] = {}
        for one in own:
            text = one.field("model_response", str)
            if text != _EMPTY and normalised(text):
                _, chosen = answers.get(normalised(text), (text, False))
                answers[normalised(text)] = text, chosen or one.field("if_chosen", bool)
        taken = [text for text, chosen in answers.values() if chosen]
        rejected = tuple(text for text, chosen in answers.values() if not chosen)
        if len(taken) == 1 and rejected:
            found.append(Asked(own[0], number, own[0].field("user_prompt", str), taken[0], rejected))
        else:
            undecided.append(own[0])
    return found


def interactions(undecided: list[Record], record: Record) -> Iterator[Asked]:
    """PersonalLLM's interaction database: a row a person, pair j in `prompt_j`, `response_j_a` and `response_j_b`;
    equal answers are `undecided`."""
    j = 1
    while record.has(f"prompt_{j}"):
        chosen = record.field(f"chosen_{j}", str)
        if chosen not in ("a", "b"):
            raise record.error(f"field 'chosen_{j}' is {chosen!r}; it says 'a' or 'b'")
        answers = {side: record.field(f"response_{j}_{side}", str) for side in "ab"}
        lost = answers["b" if chosen == "a" else "a"]
        if normalised(lost) != normalised(answers[chosen]):  # two models may say the same
            yield Asked(record, str(j), record.field(f"prompt_{j}", str), answers[chosen], (lost,))
        else:
            undecided.append(record)
        j += 1


def contexts_of(items: Sequence[Record], outputs: str | Path | None, load: Load) -> dict[str, list[Any]]:
    """PersonaMem's conversations by their ids."""
    if outputs is None:
        name = items[0].file
        raise items[0].error(
            f"its conversations stand in another file; give outputs='{name.replace('questions', 'shared_contexts')}'"
            if "questions" in name
            else "its conversations stand in another file; give outputs='shared_contexts_….jsonl'"
        )
    name, rows = load(outputs)
    found: dict[str, list[Any]] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(messages, list) for messages in row.values()):
            raise DataError(f"{name}, record {index}: expected an object that holds a list of messages by its id")
        found |= {str(key): messages for key, messages in row.items()}
    return found


def personamem(contexts: Mapping[str, list[Any]], record: Record) -> Iterator[Asked]:
    """A question of PersonaMem with the conversations before it."""
    key, stop = record.field("shared_context_id", str), str(record.field("end_index_in_shared_context"))
    if key not in contexts:
        raise record.error(f"there is no context {key!r} in the file of contexts")
    if not stop.isdecimal():
        raise record.error(f"field 'end_index_in_shared_context' {stop!r} is no number of messages")
    messages = [Record(f"context {key}", index, one) for index, one in enumerate(contexts[key][: int(stop)])]
    options = record.field("all_options", (str, list, tuple))
    if isinstance(options, str):
        try:
            options = ast.literal_eval(options)
        except (SyntaxError, ValueError):
            options = None
    if not isinstance(options, (list, tuple)):
        raise record.error("field 'all_options' is no list of texts")
    right, rejected = chosen_of(record, options, record.field("correct_answer", str))
    history = texts_of(record, exchanges(messages))
    if not history:
        raise record.error(f"context {key!r} holds nothing before the question", TooShortError)
    yield Asked(
        record,
        str(record.field("question_id")),
        record.field("user_question_or_message", str),
        _OPTION.sub("", right),
        tuple(_OPTION.sub("", one) for one in rejected),
        TASKS["sessions"],
        history,
    )


def options_of(items: Sequence[Record], outputs: str | Path | None, load: Load) -> list[Record]:
    """The records that hold PrefEval's options, in the order of the preferences."""
    if outputs is None:
        return list(items)
    name, rows = load(outputs)
    if len(rows) != len(items):
        held = f"{name} holds {len(rows)} records, {items[0].file} {len(items)}"
        raise DataError(f"{held}; give the file of the same topic")
    return [Record(name, index, row) for index, row in enumerate(rows)]


def prefeval(options: Sequence[Record], record: Record) -> Iterator[Asked]:
    """PrefEval: a preference, stated or shown in a conversation, and a question with four answers, the first right."""
    answered, question = options[record.index], record.field("question", str)
    if not answered.has("classification_task_options"):
        raise answered.error(
            "field 'classification_task_options' is missing: these preferences come without answers; give the file "
            "of the same topic in mcq_options as outputs="
        )
    if answered.field("question", str) != question:
        raise answered.error(f"its question is not that of {record.file}; give the file of the same topic")
    chosen, rejected = chosen_of(answered, answered.field("classification_task_options", (list, tuple)), 0)
    shown = record.has("conversation")
    task, history = profile_of(record, "conversation") if shown else profile_of(record, "preference")
    yield Asked(record, str(record.index), question, chosen, rejected, task, history)
