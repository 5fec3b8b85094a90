"""Chat templates: what they write around a user's and an assistant's words."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dps_lens.errors import PromptError, reason

_OURS = {"conversation", "tokenize", "add_generation_prompt", "continue_final_message", "chat_template", "return_dict"}
_REASONING = re.compile(r"(<|\[)(?!/)([^<>\[\]\s/]*(?:think|thought|reason)[^<>\[\]\s/]*)(>|\])\s*\Z", re.IGNORECASE)
_SAID, _ANSWERED = "Zq7 what was said", "Zq8 what was answered"
_CONVERSATION = [
    {"role": "user", "content": "How long is a ladder?"},
    {"role": "assistant", "content": "Three metres."},
    {"role": "user", "content": "And a stair?"},
]


class ChatTemplate:
    """A tokenizer's chat template with keywords of the user.

    Args:
        tokenizer: of a model.
        kwargs: what the template is rendered with.

    Raises:
        PromptError: there is no template, or it reads no such keyword.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any]) -> None:
        self._tokenizer, self._kwargs = tokenizer, dict(kwargs)
        self.there = bool(getattr(tokenizer, "chat_template", None))
        for name in self._kwargs:
            self._check(name)

    def _check(self, name: str) -> None:
        if not self.there:
            raise PromptError(f"chat_template_kwargs: {name!r} is given, but the tokenizer has no chat template")
        if name in _OURS:
            raise PromptError(f"chat_template_kwargs: {name!r} is set by the toolkit; leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", self._tokenizer.get_chat_template()):
            raise PromptError(
                f"chat_template_kwargs: the tokenizer's chat template reads no {name!r}; see its chat_template"
            )

    def ask(self, content: str, turns: Sequence[tuple[str, str]] = (), *, system: str = "") -> tuple[str, int]:
        """A prompt for the next answer, after a system turn and earlier ones, and where `content` begins in it.

        A block of reasoning that the template opens is closed, so that an answer follows.

        Raises:
            PromptError: the template changes the text, or opens a block whose end is not known.
        """
        before, after = self._around_last(_messages(turns, content, system))
        return before + content + after + self._closing(after), len(before)

    def converse(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, int]:
        """A prompt for the next answer in a conversation, just as the template renders it, and where the content of the
        last message begins in it. A block of reasoning that the template opens stays open.

        Raises:
            PromptError: the template refuses these messages, or changes the last one.
        """
        from jinja2 import TemplateError

        said = [dict(one) for one in messages]
        try:
            try:
                before, after = self._around_last(said)
            except PromptError:
                # Many templates leave out the blanks around a message.
                said[-1]["content"] = said[-1]["content"].strip()
                before, after = self._around_last(said)
        except (TemplateError, TypeError, ValueError) as error:
            raise PromptError(f"the tokenizer's chat template refuses these messages ({reason(error)})") from error
        return before + said[-1]["content"] + after, len(before)

    def _around_last(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """What a prompt for the next answer holds before and behind the content of the last message."""
        content = messages[-1]["content"]
        text = self._render(messages, add_generation_prompt=True)
        if text.count(content) == 1:
            before, after = text.split(content)
            return before, after
        # The words of the template may be those of the message, so they are found around other words.
        marked = [*messages[:-1], {**messages[-1], "content": _SAID}]
        before, _, after = self._render(marked, add_generation_prompt=True).partition(_SAID)
        if before + content + after != text:
            raise PromptError("build_prompt: the tokenizer's chat template changes the text of a message")
        return before, after

    def _closing(self, after: str) -> str:
        """What ends the block of reasoning that is open at the end of a prompt."""
        opened = _REASONING.search(after)
        if not opened or opened[2].upper().startswith(("END", "|END")):
            return ""
        written = self._before_answer()
        if written is not None and len(written) > len(after) and written.startswith(after):
            return written.removeprefix(after)
        if "|" in opened[2]:
            raise PromptError(
                f"build_prompt: the chat template opens {opened[0].strip()!r} before an answer and does not show how "
                "it ends; switch reasoning off with chat_template_kwargs in PromptConfig"
            )
        line = "" if opened[0].endswith("\n") else "\n"
        return f"{line}\n{opened[1]}/{opened[2]}{opened[3]}\n\n"

    def _before_answer(self) -> str | None:
        """What stands between a message and a finished answer."""
        return self._around()[0]

    def after_answer(self) -> str | None:
        """What stands after a finished answer; None where the template does not show it."""
        return self._around()[1]

    def _around(self) -> tuple[str | None, str | None]:
        from jinja2 import TemplateError

        try:
            text = self._render([*_messages((), _SAID), {"role": "assistant", "content": _ANSWERED}])
        except (TemplateError, TypeError, ValueError):
            return None, None
        _, said, rest = text.partition(_SAID)
        before, answered, after = rest.partition(_ANSWERED)
        return (before, after) if said and answered else (None, None)

    def shown(self) -> str:
        """A fixed conversation as the template renders it; its complaint where it refuses it."""
        from jinja2 import TemplateError

        try:
            return self._render(_CONVERSATION, add_generation_prompt=True) if self.there else ""
        except (TemplateError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **self._kwargs
            )
        )


def _messages(turns: Sequence[tuple[str, str]], content: str, system: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    earlier = [{"role": role, "content": said} for turn in turns for role, said in zip(roles, turn, strict=True)]
    first = [{"role": "system", "content": system}] if system else []
    return [*first, *earlier, {"role": "user", "content": content}]
