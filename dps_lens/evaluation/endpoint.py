"""A chat model behind an OpenAI-compatible address, every answer of which is kept."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dps_lens.errors import EvaluationError, reason
from dps_lens.files import read_object, write_json

MAX_REPLY = 16 * 2**20
"""Bytes of a reply, unpacked, above which it is none."""


class BudgetError(EvaluationError):
    """An endpoint has been asked as often as it may be."""


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message


class _Reply(BaseModel):
    """What an endpoint has to send."""

    choices: list[_Choice]
    usage: dict[str, Any] | None = None

    def answer(self) -> str:
        """The text; empty where the model refuses or says nothing."""
        return (self.choices[0].message.content or "") if self.choices else ""

    def tokens(self) -> dict[str, int]:
        return {name: n for name, n in (self.usage or {}).items() if isinstance(n, int) and 0 <= n < 2**63}


class Endpoint:
    """Asks at temperature 0; what was answered once is never asked again.

    An empty answer (a refusal, no choice, no content) is not kept: the next call with this cache asks again, as it
    does where a kept answer is damaged. Redirects are not followed, as the texts would go to another server.

    Args:
        model: as the server calls it.
        base_url: such as `"http://127.0.0.1:8000/v1"`; OpenAI's own by default.
        api_key: by default what the environment's `OPENAI_API_KEY` holds; local servers take any.
        cache: folder of the answers, one file each, written as soon as it is there.
        max_calls: answers that may be paid for by this object; None for no limit.
        timeout: seconds until a call counts as failed.
        retries: of a call that fails, with growing pauses (connection, time-out, rate limit, server error).
        max_tokens: of an answer.

    Attributes:
        calls: answers that were paid for by this object.
    """

    def __init__(
        self,
        model: str,
        *,
        cache: str | Path,
        base_url: str | None = None,
        api_key: str | None = None,
        max_calls: int | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        max_tokens: int = 256,
    ) -> None:
        self.model, self.base_url, self.cache = model, base_url, Path(cache)
        self.max_calls, self.calls = max_calls, 0
        self._key, self._timeout, self._retries, self._max_tokens = api_key, timeout, retries, max_tokens

    @cached_property
    def _client(self) -> Any:
        try:
            import openai
        except ImportError:
            raise EvaluationError("Endpoint: the openai client is missing; pip install openai") from None
        # A server of one's own asks for no key, the client does.
        key = self._key or ("none" if self.base_url else None)
        bounded: dict[str, list[Any]] = {"response": [partial(_read_bounded, seconds=self._timeout)]}
        try:
            http = openai.DefaultHttpxClient(follow_redirects=False, timeout=self._timeout, event_hooks=bounded)
            return openai.OpenAI(
                base_url=self.base_url, api_key=key, timeout=self._timeout, max_retries=self._retries, http_client=http
            )
        except Exception as error:  # of the client, or of one of two libraries below it, for an address that is none
            raise EvaluationError(f"Endpoint: {error}") from None

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The answer to a conversation, from the cache where it is there.

        Raises:
            BudgetError: `max_calls` answers were paid for.
            EvaluationError: the endpoint cannot be reached, refuses, or sends what is no reply of a chat model; what
                was answered before is kept.
        """
        request = {"model": self.model, "messages": [dict(message) for message in messages], "temperature": 0}
        request["max_tokens"] = self._max_tokens
        about = json.dumps({"base_url": self.base_url, **request}, sort_keys=True)
        file = self.cache / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"
        if (kept := _kept(file, request)) is not None:
            return kept
        if self.max_calls is not None and self.calls >= self.max_calls:
            raise BudgetError(f"Endpoint: {self.calls} calls were made, as many as max_calls allows; raise it to go on")
        reply = self._reply(request)
        self.calls += 1
        if answer := reply.answer():
            of = {"request": request, "answer": answer, "digest": _digest(answer), "usage": reply.tokens()}
            write_json(file, of)
        return answer

    def _reply(self, request: Mapping[str, Any]) -> _Reply:
        client = self._client
        try:
            sent = client.chat.completions.with_raw_response.create(**request)
            return _Reply.model_validate_json(sent.content)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            said = f"what came is no reply of a chat model: {f'{place}: ' if place else ''}{first['msg']}"
        except Exception as error:  # of the client, of one of two libraries below it, or of ours inside it
            cause = f": {reason(error.__cause__)}" if error.__cause__ is not None else ""
            said = f"{type(error).__name__}: {reason(error)}{cause}"
        raise EvaluationError(
            f"Endpoint: {self.base_url or 'OpenAI'} gave no answer ({said}); what it answered before is in "
            f"{self.cache}, run the same again to go on"
        )


def _kept(file: Path, request: Mapping[str, Any]) -> str | None:
    """An answer that was kept whole."""
    if not os.path.isfile(file):
        return None
    try:
        found = read_object(file, EvaluationError)
    except EvaluationError:
        return None
    answer = found.get("answer")
    if not isinstance(answer, str) or not answer or found.get("request") != request:
        return None
    return answer if found.get("digest", _digest(answer)) == _digest(answer) else None


def _digest(answer: str) -> str:
    return hashlib.sha256(answer.encode()).hexdigest()[:16]


def _read_bounded(response: Any, *, seconds: float) -> None:
    """Read a reply that is neither too long, packed or not, nor too slow; each part of it comes in time by itself.

    Raises:
        EvaluationError: it is.
    """
    until, found = time.monotonic() + seconds, bytearray()
    for part in response.iter_bytes():
        found += part
        if len(found) > MAX_REPLY:
            raise EvaluationError(f"the reply has more than {MAX_REPLY} bytes")
        if time.monotonic() > until:
            raise EvaluationError(f"the reply is not whole after {seconds:g} seconds")
    response._content = bytes(found)  # where the client's own read() would put it
