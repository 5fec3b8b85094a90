"""An answer over HTTP: whole, or as server-sent events, in OpenAI's shapes."""

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dps_lens.errors import DPSLensError, FileError
from dps_lens.serving.answer import Done, Event, Failed, Piece, Started, Token
from dps_lens.serving.engine import BusyError, Engine, Job, StoppingError, TimedOutError
from dps_lens.serving.failures import error_body, note_failure
from dps_lens.serving.resolve import UnknownModelError, UnknownUserError
from dps_lens.serving.schema import ChatRequest, CompletionRequest
from dps_lens.steering.continuous import Writing

_POLL = 0.5
_GONE = 499  # as nginx says of a client that has left


class Answer:
    """One answer.

    Args:
        request: it answers.
        asked: what it holds.
        name: of the model.
        chat: it answers a chat, not a completion.
    """

    def __init__(self, request: Request, asked: ChatRequest | CompletionRequest, name: str, *, chat: bool) -> None:
        self._request, self._asked, self._chat = request, asked, chat
        self._engine: Engine = request.app.state.engine
        kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        self._about = {"id": f"{prefix}-{request.state.number}", "created": int(time.time()), "model": name}
        self._kind = kind
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self._started: set[int] = set()
        self._kept: deque[tuple[int, Event]] = deque()
        self._sending = False
        self._offsets: dict[int, int] = {}
        self._prompt_tokens, self._tokens = 0, 0

    async def respond(self, makers: Sequence[Callable[[], Writing]]) -> Response:
        """The response, once it is known that there is one.

        Raises:
            DPSLensError: the engine takes no more requests.
        """
        loop = asyncio.get_running_loop()

        def tell(number: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        stops = self._asked.stops
        self._jobs = [Job(make, partial(tell, number), stops) for number, make in enumerate(makers)]
        self._engine.submit(self._jobs)
        try:
            # What is wrong with a request is found before its answer begins, and has a status of its own. Prompts that
            # have found room may be answered while others wait for theirs.
            while len(self._started) < len(self._jobs):
                number, event = await self._take()
                if event is None:
                    return Response(status_code=_GONE)
                if isinstance(event, Failed):
                    return refusal(event.error)
                self._kept.append((number, event))
            if self._asked.stream:
                self._sending = True
                stream = self._stream()
                return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            return await self._whole()
        finally:
            if not self._sending:
                self._leave()

    def _leave(self) -> None:
        """Nobody waits any more for what is still written."""
        for job in self._jobs:
            self._engine.cancel(job)

    async def _next(self) -> tuple[int, Event | None]:
        """The next event, and of which prompt; None when the client has gone."""
        return self._kept.popleft() if self._kept else await self._take()

    async def _take(self) -> tuple[int, Event | None]:
        """As `_next`, of those that nobody has seen."""
        while True:
            # Whoever sends a stream ends it.
            if not self._sending and await self._request.is_disconnected():
                return 0, None
            try:
                number, event = await asyncio.wait_for(self._events.get(), _POLL)
            except asyncio.TimeoutError:
                continue
            if isinstance(event, Started):
                self._started.add(number)
                self._prompt_tokens += event.prompt_tokens
            elif isinstance(event, Piece):
                self._tokens += len(event.tokens)
            return number, event

    async def _whole(self) -> Response:
        texts: dict[int, list[Piece]] = {}
        left = len(self._jobs)
        while left:
            number, event = await self._next()
            if event is None:
                return Response(status_code=_GONE)
            if isinstance(event, Failed):
                return refusal(event.error)
            if isinstance(event, Piece):
                texts.setdefault(number * self._asked.texts + event.index, []).append(event)
            left -= isinstance(event, Done)
        choices = [self._choice(index, texts[index]) for index in sorted(texts)]
        return JSONResponse({**self._about, "object": self._kind, "choices": choices, "usage": self._usage})

    async def _stream(self) -> AsyncIterator[str]:
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        options = self._asked.stream_options
        usage = options is not None and options.include_usage

        def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
            # Where usage is asked for, every chunk names it, and the last one holds it.
            shown = {"usage": None, **more} if usage else more
            return f"data: {json.dumps({**self._about, 'object': kind, 'choices': choices, **shown})}\n\n"

        begun: set[int] = set()
        left = len(self._jobs)
        try:
            while left:
                number, event = await self._next()
                if isinstance(event, Failed):
                    yield f"data: {json.dumps(json.loads(bytes(refusal(event.error).body)))}\n\n"
                    return
                left -= isinstance(event, Done)
                if isinstance(event, Piece) and (event.text or event.tokens or event.finish):
                    index = number * self._asked.texts + event.index
                    choice = self._choice(index, [event], first=index not in begun)
                    begun.add(index)
                    yield chunk([choice])
            if usage:
                yield chunk([], usage=self._usage)
            yield "data: [DONE]\n\n"
        finally:
            self._leave()

    @property
    def _usage(self) -> dict[str, int]:
        prompt, text = self._prompt_tokens, self._tokens
        return {"prompt_tokens": prompt, "completion_tokens": text, "total_tokens": prompt + text}

    def _choice(self, index: int, pieces: Sequence[Piece], *, first: bool | None = None) -> dict[str, Any]:
        """A choice of an answer, or of a chunk of a stream, whose first one names the role."""
        text, tokens = "".join(piece.text for piece in pieces), [one for piece in pieces for one in piece.tokens]
        choice: dict[str, Any] = {"index": index, "finish_reason": pieces[-1].finish}
        if self._chat:
            role = {"role": "assistant"} if first is not False else {}
            choice["message" if first is None else "delta"] = {**role, "content": text}
            choice["logprobs"] = {"content": [_chat_logprob(one) for one in tokens]} if self._asked.logprobs else None
        else:
            choice["text"] = text
            wanted = self._asked.logprobs is not None
            choice["logprobs"] = self._completion_logprobs(index, tokens) if wanted else None
        if self._asked.dps is not None and self._asked.dps.report:
            choice["dps"] = {"kl": [one.kl for one in tokens], "shifts": [one.shift for one in tokens]}
        return choice

    def _completion_logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """Of more tokens of a text."""
        offsets = []
        for token in tokens:
            offsets.append(self._offsets.setdefault(index, 0))
            self._offsets[index] += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            # Of tokens that read alike, pieces of characters say, the likeliest.
            "top_logprobs": [{text: _finite(value) for text, value in reversed(one.likeliest)} for one in tokens],
            "text_offset": offsets,
        }


def _chat_logprob(token: Token) -> dict[str, Any]:
    return {
        **_logprob(token.text, token.logprob),
        "top_logprobs": [_logprob(text, logprob) for text, logprob in token.likeliest],
    }


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    # Of a piece of a character it is not known here which bytes it stands for.
    whole = "\ufffd" not in text
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode()) if whole else None}


def _finite(logprob: float) -> float:
    """What JSON can hold of a log-probability, as OpenAI's API writes it."""
    return max(logprob, -9999.0)


def refusal(error: Exception) -> Response:
    """What is answered to a request that failed."""
    if isinstance(error, BusyError):
        return error_answer(429, str(error), code="too_many_requests", headers={"retry-after": str(error.seconds)})
    status, code = _status(error)
    if status == 500:
        note_failure(error)
        return error_answer(500, f"the server failed ({type(error).__name__}); its log says more", code=code)
    return error_answer(status, str(error), code=code)


def _status(error: Exception) -> tuple[int, str]:
    if isinstance(error, UnknownUserError):
        return 404, "user_not_found"
    if isinstance(error, UnknownModelError):
        return 404, "model_not_found"
    if isinstance(error, StoppingError):
        return 503, "stopping"
    if isinstance(error, TimedOutError):
        return 504, "timeout"
    if isinstance(error, FileError):
        return 500, "storage"
    return (400, "invalid_value") if isinstance(error, DPSLensError) else (500, "internal_error")


def error_answer(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Any = None
) -> Response:
    return JSONResponse(error_body(status, message, param=param, code=code), status_code=status, headers=headers)
