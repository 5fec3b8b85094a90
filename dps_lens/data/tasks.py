"""The tasks of LaMP (arXiv 2304.11406) and LongLaMP (arXiv 2407.11016).

A task knows how a document of the history reads in a prompt, what an input asks for, and how a
document becomes an example of its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dps_lens.errors import DataError


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: `"lamp-1"` … `"lamp-7"`, `"longlamp-abstract"`, `"longlamp-review"`, `"longlamp-topic"`; of preferences
            `"pairs"`, `"choices"`, `"questions"`, `"sessions"`, `"preferences"`, by what stands in the profile.
        fields: fields that a document of the history must have.
        body: the field that is cut when a document is too long for its share of a prompt.
        snippet: how a document reads in a prompt; `{field}` stands for a field.
        keyword: an input's own content follows this text; everything before it is the instruction; `""` where there
            is none.
        source: the template of a discovery input; `""` appends the field to the instruction.
        target: the field that a discovery example asks for, None when documents hold no pairs.
        asked: the field that a discovery input shows, when the input is instruction + field.
        closed: answers come from a closed set, so that equal answers do not mean equal texts.
        max_new_tokens: a generous length for a generated answer.
        header: stands above a profile.
        brief: letters that a profile shows of each field but the body; None shows all.
        least: tokens of a body for which a profile has room, before it shows another document.
    """

    name: str
    fields: tuple[str, ...]
    body: str
    snippet: str
    keyword: str
    target: str | None = None
    asked: str = ""
    source: str = ""
    closed: bool = False
    max_new_tokens: int = 32
    header: str = "Earlier texts by this user:"
    brief: int | None = None
    least: int = 0

    @property
    def has_pairs(self) -> bool:
        """A document holds both what a task input shows and what it asks for."""
        return self.target is not None

    def parts(self, fields: Mapping[str, Any]) -> tuple[str, str, str]:
        """A document's snippet as text before, inside and after the field that may be cut."""
        before, after = self.snippet.split("{" + self.body + "}")
        values = {name: _one_line(fields[name]) for name in self.fields}
        for name in self.fields:
            if name != self.body and self.brief is not None and len(values[name]) > self.brief:
                values[name] = values[name][: self.brief].rstrip() + " …"
        return before.format(**values), values[self.body], after.format(**values)

    def query(self, task_input: str) -> str:
        """What retrieval looks for: the input after its keyword."""
        position = task_input.find(self.keyword) if self.keyword else -1
        return task_input[position + len(self.keyword) :].strip() if position >= 0 else task_input

    def pair(self, fields: Mapping[str, Any], template: str) -> tuple[str, str] | None:
        """A document as input and answer, worded like `template`, an input of the same task."""
        if self.target is None:
            return None
        answer = str(fields[self.target]).strip()
        if not answer:
            return None
        if self.source:
            return self.source.format(**{name: _one_line(fields[name]) for name in self.fields}), answer
        if not self.keyword:
            return str(fields[self.asked]).strip(), answer
        shown = _one_line(fields[self.asked])
        if self.keyword == '"':
            # The shown field is what the template quotes: `… a post titled "…".`
            return re.sub(r'"[^"]*"', lambda _: f'"{shown}"', template or 'Write the text titled "".', count=1), answer
        position = template.find(self.keyword)
        instruction = template[: position + len(self.keyword)] if position >= 0 else self.keyword
        return f"{instruction} {shown}", answer


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("lamp-1", ("title", "abstract"), "title", '"{title}"', "title", max_new_tokens=8),
        Task(
            "lamp-2",
            ("tag", "description"),
            "description",
            'the tag for the movie: "{description}" is "{tag}"',
            "description:",
            target="tag",
            closed=True,
            asked="description",
            max_new_tokens=8,
        ),
        Task(
            "lamp-3",
            ("text", "score"),
            "text",
            '{score} is the score for "{text}"',
            "review:",
            target="score",
            closed=True,
            asked="text",
            max_new_tokens=4,
        ),
        Task(
            "lamp-4",
            ("title", "text"),
            "text",
            '"{title}" is the title for "{text}"',
            "article:",
            target="title",
            asked="text",
        ),
        Task(
            "lamp-5",
            ("title", "abstract"),
            "abstract",
            '"{title}" is the title for "{abstract}"',
            "paper:",
            target="title",
            asked="abstract",
        ),
        Task(
            "lamp-6",
            ("title", "text"),
            "text",
            '"{title}" is the title for "{text}"',
            "email:",
            target="title",
            asked="text",
        ),
        Task("lamp-7", ("text",), "text", '"{text}"', "before or after it:", max_new_tokens=64),
        Task(
            "longlamp-abstract",
            ("title", "abstract"),
            "abstract",
            '"{title}" is the title of the abstract "{abstract}"',
            "title",
            target="abstract",
            source='Generate an abstract for the title "{title}".',
            max_new_tokens=256,
        ),
        Task(
            "longlamp-review",
            ("description", "overall", "reviewText", "summary"),
            "reviewText",
            'a review rated {overall} of the product "{description}", with the summary "{summary}", is "{reviewText}"',
            "product",
            target="reviewText",
            source=(
                'Generate the review text written by a reviewer who has a given an overall rating of "{overall}" for a '
                'product with description "{description}". The summary of the review text is "{summary}".'
            ),
            max_new_tokens=256,
        ),
        Task(
            "longlamp-topic",
            ("content", "summary"),
            "content",
            '"{summary}" is the title of the text "{content}"',
            '"',
            target="content",
            asked="summary",
            max_new_tokens=256,
        ),
        Task(
            "pairs",
            ("prompt", "chosen"),
            "chosen",
            'to "{prompt}" the user preferred "{chosen}"',
            "",
            target="chosen",
            asked="prompt",
            max_new_tokens=256,
            header="What this user preferred before:",
            brief=160,
            least=24,
        ),
        Task(
            "choices",
            ("prompt", "chosen"),
            "prompt",
            'to "{prompt}" the user chose "{chosen}"',
            "",
            target="chosen",
            asked="prompt",
            closed=True,
            header="What this user chose before:",
            brief=160,
            least=24,
        ),
        Task("questions", ("text",), "text", '"{text}"', "", max_new_tokens=256),
        Task("sessions", ("text",), "text", "{text}", "", max_new_tokens=256, header="Earlier conversations:"),
        Task("preferences", ("text",), "text", "{text}", "", max_new_tokens=256, header="About this user:"),
    )
}

OF_PREFERENCES = ("pairs", "choices", "questions", "sessions", "preferences")
"""Tasks of `dps_lens.data.preferences`."""

_LAMP_MARKS = {
    "lamp-1": "which reference is related",
    "lamp-2": "tag does this movie",
    "lamp-3": "what is the score of the following review",
    "lamp-4": "headline for the following article",
    "lamp-5": "title for the following abstract",
    "lamp-6": "subject for the following email",
    "lamp-7": "paraphrase the following tweet",
}
_LONGLAMP_MARKS = {"longlamp-abstract": "abstract", "longlamp-review": "reviewText", "longlamp-topic": "content"}


def find_task(task_input: str, profile: list[Mapping[str, Any]], hint: str | None = None) -> Task:
    """The task of a record: by name, by the wording of its input, or by the fields of its profile.

    Raises:
        DataError: no task matches.
    """
    if hint:
        name = hint.lower().replace("_", "-")
        if name not in TASKS:
            raise DataError(f"task {hint!r} is unknown; use one of {', '.join(TASKS)}")
        return TASKS[name]
    lowered = task_input.lower()
    for name, mark in _LAMP_MARKS.items():
        if mark in lowered:
            return TASKS[name]
    for name, mark in _LONGLAMP_MARKS.items():
        if profile and mark in profile[0]:
            return TASKS[name]
    raise DataError(f"cannot tell the task from the input {task_input[:60]!r}; give task= one of {', '.join(TASKS)}")
