"""OpenAI's API over a steered model: chats, completions, models, and users' profiles."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from dps_lens.data import PromptConfig
from dps_lens.errors import DPSLensError
from dps_lens.model import HookedModel, ModelThread
from dps_lens.serving.engine import Engine
from dps_lens.serving.keys import Key, Keys
from dps_lens.serving.limits import Limits
from dps_lens.serving.metrics import Metrics
from dps_lens.serving.middleware import Gate, Notes
from dps_lens.serving.profiles import ProfileStore, SteeringProfile, model_of
from dps_lens.serving.resolve import Resolver, UnknownModelError, UnknownUserError
from dps_lens.serving.respond import Answer, error_answer, refusal
from dps_lens.serving.schema import ChatRequest, CompletionRequest, ErrorAnswer
from dps_lens.serving.steered import Steering
from dps_lens.version import __version__

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
    limits: Limits | None = None,
    prompt_config: PromptConfig | None = None,
    thread: ModelThread | None = None,
) -> FastAPI:
    """An ASGI application that answers OpenAI's requests with a steered model.

    The model's weights are read once, here, to know whose profiles are of this model.

    Args:
        model: a hooked model, which is the server's alone while it runs.
        name: that requests call it by; its own by default.
        profiles: folder of users' profiles.
        keys: that are let in; without any, the server is for this machine only.
        default: how answers are steered where a request says nothing; not at all by default.
        limits: what is held at most.
        prompt_config: how much of a user's documents is shown.
        thread: in which the model was loaded, and runs; one of its own by default.

    Raises:
        SteeringError: the default lacks what its rule needs, or is not of this model.
        FileError: the folder cannot be made.
    """
    metrics, who, bounds, about = Metrics(), keys or Keys(), limits or Limits(), model_of(model)
    store = None if profiles is None else ProfileStore(profiles)
    resolver = Resolver(model, about, store, default=default, most_tokens=bounds.tokens, prompt_config=prompt_config)
    served = name or about["name"]

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = Engine(model, bounds, metrics=metrics, thread=thread)
        yield
        await asyncio.to_thread(app.state.engine.close)

    app = FastAPI(
        title="dps_lens", version=__version__, lifespan=life, responses=_ERRORS, docs_url=None, redoc_url=None
    )
    app.state.name = served
    app.add_middleware(Gate, keys=who, most_bytes=bounds.bytes)
    app.add_middleware(Notes, metrics=metrics)
    _tell_errors(app)
    _add_answers(app, served, resolver)
    if store is not None:
        _add_profiles(app, store, model, about)
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
            message = f"{place}: {found['msg']}" if place else str(found["msg"])
        return error_answer(400, message, param=place or None, code="invalid_value")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return error_answer(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(DPSLensError)
    async def ours(request: Request, error: DPSLensError) -> Response:
        return refusal(error)


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


def _add_profiles(app: FastAPI, store: ProfileStore, model: HookedModel, about: dict[str, Any]) -> None:
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
        known = profile if profile.model else profile.model_copy(update={"model": about})
        known.check(model, about)
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
        raise UnknownModelError(f"the model {asked!r:.200} is not served here; it is {name!r}")


def _add_answers(app: FastAPI, name: str, resolver: Resolver) -> None:
    @app.post("/v1/chat/completions", responses=_STREAMED)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        _check_name(asked.model, name)
        steering = await asyncio.to_thread(resolver.steering, asked.dps, request.state.key)
        answer = Answer(request, asked, name, chat=True)
        return await answer.respond([partial(resolver.chat, asked, steering)])

    @app.post("/v1/completions", responses=_STREAMED)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        _check_name(asked.model, name)
        steering = await asyncio.to_thread(resolver.steering, asked.dps, request.state.key)
        answer = Answer(request, asked, name, chat=False)
        return await answer.respond([partial(resolver.completion, asked, one, steering) for one in asked.prompts])
