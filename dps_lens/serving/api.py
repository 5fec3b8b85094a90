"""OpenAI's API over a steered model: chats, completions, models, and users' profiles."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from dps_lens.data import PromptConfig
from dps_lens.errors import DPSLensError, FileError
from dps_lens.model import HookedModel
from dps_lens.serving.answer import Done, Event, Failed, Piece, Started, Token
from dps_lens.serving.engine import BusyError, Engine, Job, StoppingError, TimedOutError
from dps_lens.serving.keys import Key, Keys
from dps_lens.serving.limits import Gate, Notes, error_body, note_failure
from dps_lens.serving.metrics import Metrics
from dps_lens.serving.profiles import ProfileStore, SteeringProfile, model_of
from dps_lens.serving.resolve import Resolver, Steering, UnknownUserError
from dps_lens.serving.schema import ChatRequest, CompletionRequest, ErrorAnswer
from dps_lens.steering.continuous import Writing
from dps_lens.version import __version__

_POLL = 0.5
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 403, 404, 413, 422, 429, 500, 503, 504)
}

_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


def make_server(
    model: HookedModel,
    *,
    name: str = "",
    profiles: str | Path | None = None,
    keys: Keys | None = None,
    default: Steering | None = None,
    most_tokens: int = 1024,
    most_bytes: int = 4 * 2**20,
    prompt_config: PromptConfig | None = None,
    **engine: Any,
) -> FastAPI:
    """An ASGI application that answers OpenAI's requests with a steered model.

    Args:
        model: a hooked model, which is the server's alone while it runs.
        name: that requests call it by; its own by default.
        profiles: folder of users' profiles.
        keys: that are let in; without any, the server is for this machine only.
        default: how answers are steered where a request says nothing; not at all by default.
        most_tokens: that a text may have.
        most_bytes: of a request.
        prompt_config: how much of a user's documents is shown.
        engine: settings of `Engine`.

    Raises:
        FileError: the folder cannot be made.
    """
    metrics, who = Metrics(), keys or Keys()
    store = None if profiles is None else ProfileStore(profiles)
    resolver = Resolver(model, store, default=default, most_tokens=most_tokens, prompt_config=prompt_config)
    served = name or model_of(model)["name"]

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = Engine(model, metrics=metrics, **engine)
        yield
        await asyncio.to_thread(app.state.engine.close)

    app = FastAPI(
        title="dps_lens", version=__version__, lifespan=life, responses=_ERRORS, docs_url=None, redoc_url=None
    )
    app.state.name = served
    app.add_middleware(Gate, keys=who, most_bytes=most_bytes)
    app.add_middleware(Notes, metrics=metrics)
    _tell_errors(app)
    _add_answers(app, served, resolver)
    if store is not None:
        _add_profiles(app, store, model)
    _add_operations(app, served, metrics)
    return app


def _tell_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()[0]
        place = ".".join(str(part) for part in found["loc"][1:])
        if found["type"] == "extra_forbidden":
            message = f"{place} is not known to this server, which would answer as if it were not there; leave it out"
        else:
            message = f"{place}: {found['msg']}" if place else found["msg"]
        return _error(400, message, param=place or None, code="invalid_value")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(DPSLensError)
    async def ours(request: Request, error: DPSLensError) -> Response:
        return _refusal(error)


def _refusal(error: Exception) -> Response:
    """What is answered to a request that failed."""
    if isinstance(error, BusyError):
        return _error(429, str(error), code="too_many_requests", headers={"retry-after": str(error.seconds)})
    status, code = _status(error)
    if status == 500:
        note_failure(error)
        return _error(500, f"the server failed ({type(error).__name__}); its log says more", code=code)
    return _error(status, str(error), code=code)


def _status(error: Exception) -> tuple[int, str]:
    if isinstance(error, UnknownUserError):
        return 404, "user_not_found"
    if isinstance(error, StoppingError):
        return 503, "stopping"
    if isinstance(error, TimedOutError):
        return 504, "timeout"
    if isinstance(error, FileError):
        return 500, "storage"
    return (400, "invalid_value") if isinstance(error, DPSLensError) else (500, "internal_error")


def _error(
    status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Any = None
) -> Response:
    return JSONResponse(error_body(status, message, param=param, code=code), status_code=status, headers=headers)


def _add_operations(app: FastAPI, name: str, metrics: Metrics) -> None:
    made = int(time.time())
    about = {"id": name, "object": "model", "created": made, "owned_by": "dps_lens"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_name(model, name)
        return about

    @app.get("/healthz")
    async def health(request: Request) -> Response:
        engine: Engine = request.app.state.engine
        status = "ok" if engine.running else "failed"
        body = {"status": status, "model": name, "waiting": engine.waiting, "rows": engine.rows}
        return JSONResponse(body, status_code=200 if engine.running else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def numbers() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_profiles(app: FastAPI, store: ProfileStore, model: HookedModel) -> None:
    def admin(request: Request) -> None:
        key: Key | None = request.state.key
        if key is None or not key.admin:
            raise HTTPException(
                403, "profiles are for admins: start the server with --keys, and send a key made with --admin"
            )

    @app.get("/v1/profiles")
    def users(request: Request) -> dict[str, Any]:
        admin(request)
        return {"object": "list", "data": [{"user": user} for user in store]}

    @app.get("/v1/profiles/{user:path}")
    def read(user: str, request: Request) -> SteeringProfile:
        admin(request)
        found = store.read(user)
        if found is None:
            raise UnknownUserError(f"there is no profile of user {user!r:.200}")
        return found

    @app.put("/v1/profiles/{user:path}")
    def write(user: str, profile: SteeringProfile, request: Request) -> SteeringProfile:
        admin(request)
        if profile.user != user:
            raise HTTPException(400, f"the profile is of user {profile.user!r:.200}, the address of {user!r:.200}")
        known = profile if profile.model else profile.model_copy(update={"model": model_of(model)})
        known.check(model)
        store.write(known)
        return known

    @app.delete("/v1/profiles/{user:path}")
    def delete(user: str, request: Request) -> dict[str, Any]:
        admin(request)
        if not store.delete(user):
            raise UnknownUserError(f"there is no profile of user {user!r:.200}")
        return {"user": user, "deleted": True}


def _check_name(asked: str, name: str) -> None:
    if asked != name:
        raise HTTPException(404, f"the model {asked!r:.200} is not served here; it is {name!r}")


def _add_answers(app: FastAPI, name: str, resolver: Resolver) -> None:
    @app.post("/v1/chat/completions", responses=_STREAMED)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        _check_name(asked.model, name)
        steering = await asyncio.to_thread(resolver.steering, asked.dps, request.state.key)
        answer = _Answer(request, asked, name, chat=True)
        return await answer.respond([partial(resolver.chat, asked, steering)])

    @app.post("/v1/completions", responses=_STREAMED)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        _check_name(asked.model, name)
        steering = await asyncio.to_thread(resolver.steering, asked.dps, request.state.key)
        answer = _Answer(request, asked, name, chat=False)
        return await answer.respond([partial(resolver.completion, asked, one, steering) for one in asked.prompts])


class _Answer:
    """One answer, whole or streamed."""

    def __init__(self, request: Request, asked: ChatRequest | CompletionRequest, name: str, *, chat: bool) -> None:
        self._request, self._asked, self._chat = request, asked, chat
        self._engine: Engine = request.app.state.engine
        kind, prefix = ("chat.completion", "chatcmpl") if chat else ("text_completion", "cmpl")
        self._about = {"id": f"{prefix}-{request.state.number}", "created": int(time.time()), "model": name}
        self._kind = kind
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: list[Job] = []
        self._prompt_tokens, self._tokens = 0, 0

    async def respond(self, makers: Sequence[Callable[[], Writing]]) -> Response:
        """The response, once it is known that there is one."""
        loop = asyncio.get_running_loop()

        def tell(number: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        stops = self._asked.stops
        self._jobs = [Job(make, partial(tell, number), stops) for number, make in enumerate(makers)]
        self._engine.submit(self._jobs)
        events = self._until_done()
        try:
            # What is wrong with a request is found before its answer begins, and has a status of its own.
            early = [await anext(events)]
            while isinstance(early[-1][1], Started) and self._started < len(self._jobs):
                early.append(await anext(events))
            if isinstance(failed := early[-1][1], Failed):
                return _refusal(failed.error)
            if self._asked.stream:
                stream = self._stream(early, events)
                return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
            return await self._whole(early, events)
        except BaseException:
            self._leave()
            raise

    @property
    def _started(self) -> int:
        return sum(job.started for job in self._jobs)

    def _leave(self) -> None:
        for job in self._jobs:
            self._engine.cancel(job)

    async def _until_done(self) -> AsyncIterator[tuple[int, Event]]:
        """Events of all jobs, until each is done or one has failed; ends when the client has gone."""
        left = len(self._jobs)
        while left:
            try:
                number, event = await asyncio.wait_for(self._events.get(), _POLL)
            except asyncio.TimeoutError:
                if await self._request.is_disconnected():
                    self._leave()
                    raise HTTPException(499, "the client has gone") from None
                continue
            if isinstance(event, Started):
                self._jobs[number].started = True
                self._prompt_tokens += event.prompt_tokens
            elif isinstance(event, Piece):
                self._tokens += len(event.tokens)
            elif isinstance(event, Done):
                left -= 1
            yield number, event
            if isinstance(event, Failed):
                self._leave()
                return

    async def _whole(self, early: Sequence[tuple[int, Event]], events: AsyncIterator[tuple[int, Event]]) -> Response:
        texts: dict[int, list[Piece]] = {}
        async for number, event in _chained(early, events):
            if isinstance(event, Failed):
                return _refusal(event.error)
            if isinstance(event, Piece):
                texts.setdefault(number * self._asked.texts + event.index, []).append(event)
        choices = [self._choice(index, texts[index]) for index in sorted(texts)]
        return JSONResponse({**self._about, "object": self._kind, "choices": choices, "usage": self._usage})

    async def _stream(
        self, early: Sequence[tuple[int, Event]], events: AsyncIterator[tuple[int, Event]]
    ) -> AsyncIterator[str]:
        kind = f"{self._kind}.chunk" if self._chat else self._kind
        options = self._asked.stream_options
        usage = options is not None and options.include_usage

        def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
            # Where usage is asked for, every chunk names it, and the last one holds it.
            shown = {"usage": None, **more} if usage else more
            return f"data: {json.dumps({**self._about, 'object': kind, 'choices': choices, **shown})}\n\n"

        begun: set[int] = set()
        try:
            async for number, event in _chained(early, events):
                if isinstance(event, Failed):
                    body = json.loads(bytes(_refusal(event.error).body))
                    yield f"data: {json.dumps(body)}\n\n"
                    return
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
            choice["logprobs"] = _completion_logprobs(tokens) if wanted else None
        if self._asked.dps is not None and self._asked.dps.report:
            choice["dps"] = {"kl": [one.kl for one in tokens], "shifts": [one.shift for one in tokens]}
        return choice


async def _chained(
    early: Sequence[tuple[int, Event]], events: AsyncIterator[tuple[int, Event]]
) -> AsyncIterator[tuple[int, Event]]:
    for one in early:
        yield one
    async for one in events:
        yield one


def _chat_logprob(token: Token) -> dict[str, Any]:
    return {
        **_logprob(token.text, token.logprob),
        "top_logprobs": [_logprob(text, logprob) for text, logprob in token.likeliest],
    }


def _logprob(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}


def _completion_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    offsets, length = [], 0
    for token in tokens:
        offsets.append(length)
        length += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [max(token.logprob, -9999.0) for token in tokens],
        "top_logprobs": [{text: max(logprob, -9999.0) for text, logprob in token.likeliest} for token in tokens],
        "text_offset": offsets,
    }
