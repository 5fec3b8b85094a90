"""A chat model behind an OpenAI-compatible address, every answer of which is kept."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dps_lens.errors import EvaluationError
from dps_lens.files import write_json


class BudgetError(EvaluationError):
    """An endpoint has been asked as often as it may be."""


class Endpoint:
    """Asks at temperature 0; what was answered once is never asked again.

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
            raise EvaluationError("Endpoint: the openai client is missing; pip install 'dps_lens[judge]'") from None
        # A server of one's own asks for no key, the client does.
        key = self._key or ("none" if self.base_url else None)
        try:
            return openai.OpenAI(base_url=self.base_url, api_key=key, timeout=self._timeout, max_retries=self._retries)
        except openai.OpenAIError as error:
            raise EvaluationError(f"Endpoint: {error}") from None

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The answer to a conversation, from the cache where it is there.

        Raises:
            BudgetError: `max_calls` answers were paid for.
            EvaluationError: the endpoint cannot be reached or refuses; what was answered before is kept.
        """
        request = {"model": self.model, "messages": [dict(message) for message in messages], "temperature": 0}
        request["max_tokens"] = self._max_tokens
        about = json.dumps({"base_url": self.base_url, **request}, sort_keys=True)
        file = self.cache / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"
        if file.is_file():
            return str(json.loads(file.read_text(encoding="utf-8"))["answer"])
        if self.max_calls is not None and self.calls >= self.max_calls:
            raise BudgetError(f"Endpoint: {self.calls} calls were made, as many as max_calls allows; raise it to go on")
        import openai

        try:
            found = self._client.chat.completions.create(**request)
        except openai.OpenAIError as error:
            raise EvaluationError(
                f"Endpoint: {self.base_url or 'OpenAI'} gave no answer ({type(error).__name__}: {error}); what it "
                f"answered before is in {self.cache}, run the same again to go on"
            ) from error
        self.calls += 1
        answer = (found.choices[0].message.content or "") if found.choices else ""
        usage = found.usage.model_dump() if found.usage else {}
        write_json(file, {"request": request, "answer": answer, "usage": usage})
        return answer
