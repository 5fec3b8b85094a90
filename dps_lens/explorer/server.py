"""The same page with a live model behind it, on this machine only."""

import importlib.util
import json
import math
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dps_lens.checks import check_number, check_whole
from dps_lens.data import Example, PromptConfig, User, build_prompt
from dps_lens.data.examples import unit_key
from dps_lens.errors import DPSLensError, SteeringError, reason
from dps_lens.explorer.content import ranked_for
from dps_lens.explorer.page import Exploration, page
from dps_lens.files import parse_json
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.steering import DecodeConfig, generate

HOST = "127.0.0.1"
_ALTERNATIVES = 3


def make_app(model: HookedModel, users: Sequence[User], found: Exploration) -> Any:
    """A Flask application with the page at `/`, and `POST /steer`, which writes one text.

    Args:
        model: the model that was explored.
        users: those of the page.
        found: of `explore`; its grid names the rule, the examples and the length of a text.

    Raises:
        SteeringError: flask is not installed, or the exploration holds no texts.
    """
    check_flask()
    from flask import Flask, Response, jsonify, request

    if found.grid is None:
        raise SteeringError("explore: the exploration holds no texts to steer; make it with a grid")
    app, writer = Flask("dps_lens"), Writer(model, users, found)
    app.config["MAX_CONTENT_LENGTH"] = 2**20
    shown = page(found, live=True)

    @app.before_request
    def only_here() -> Any:
        # A page of another site may know this address, but not pretend to be it.
        if request.host.partition(":")[0] not in (HOST, "localhost"):
            return jsonify(error="open the page at 127.0.0.1"), 403
        return None

    @app.get("/")
    def index() -> Any:
        return Response(shown, mimetype="text/html")

    @app.post("/steer")
    def steer() -> Any:
        # Other sites cannot send JSON without being asked for permission.
        text = request.get_data(as_text=True) if request.is_json else "null"
        try:
            example, heads, gamma = writer.asked(parse_json(text, "steer", SteeringError))
        except DPSLensError as error:
            return jsonify(error=str(error)), 400
        lines = (json.dumps(line) + "\n" for line in writer.write(example, heads, gamma))
        return Response(lines, mimetype="application/x-ndjson")

    return app


def check_flask() -> None:
    """Say what to install where there is no flask.

    Raises:
        SteeringError: there is none.
    """
    if importlib.util.find_spec("flask") is None:
        raise SteeringError("explore: the live page needs flask; run: pip install flask")


def check_port(port: int) -> None:
    """Say that a port is taken before the work that a page takes.

    Raises:
        SteeringError: it is.
    """
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise SteeringError(
                f"explore: port {port} of {HOST} cannot be had ({reason(error)}); --port 0 takes a free one"
            ) from error


class Writer:
    """Writes texts of the page's examples, one at a time."""

    def __init__(self, model: HookedModel, users: Sequence[User], found: Exploration) -> None:
        self.model, self.grid = model, found.grid
        assert self.grid is not None
        asked = {one.key for one in self.grid.texts}
        shown = [one for user in users for one in user.examples if unit_key(one) in asked]
        self._examples = {(one.user_id, one.id): one for one in shown}
        total = found.scores.values[0].numel()
        owners = {one.user_id for one in self._examples.values()}
        self._heads = ranked_for(found.scores, [user for user in users if user.id in owners], total)
        self._config = PromptConfig(**self.grid.manifest["prompt_config"])
        self._lock = threading.Lock()

    def asked(self, request: object) -> tuple[Example, HeadSet, float]:
        """Example, heads and γ of a request.

        Raises:
            SteeringError: a field is missing or wrong; names it.
        """
        if not isinstance(request, dict):
            raise SteeringError("steer: send a JSON object with user, example, gamma and k")
        user, name, gamma, k = (request.get(field) for field in ("user", "example", "gamma", "k"))
        example = self._examples.get((str(user), str(name)))
        if example is None:
            raise SteeringError(f"steer: example {name!r:.80} of user {user!r:.80} is not on this page")
        strength = check_number(SteeringError, "steer: gamma", gamma, least=-1, most=1000)
        heads = self._heads[example.user_id]
        return example, heads[: check_whole(SteeringError, "steer: k", k, least=1, most=len(heads))], strength

    def write(self, example: Example, heads: HeadSet, gamma: float) -> Iterator[dict[str, Any]]:
        """`{"heads": …}`, `{"text": …}` piece by piece, then `{"done": …}`, or `{"error": …}`; closing it ends the
        text.

        Texts are written one after the other. Between pieces the model is free for other calls of this thread; where
        another thread is using it, the text ends with an error.
        """
        assert self.grid is not None
        yield {"heads": str(heads) if gamma else ""}
        with self._lock:
            try:
                prompt = build_prompt(self.model, example, config=self._config)
                stream = generate(
                    self.model,
                    prompt,
                    heads=heads,
                    gamma=gamma,
                    rule=self.grid.manifest["rule"],
                    max_new_tokens=self.grid.manifest["max_new_tokens"],
                    decode_config=DecodeConfig(keep_alternatives=_ALTERNATIVES),
                    stream=True,
                )
                for _, text in stream:
                    yield {"text": text}
                written = stream.generation
            except DPSLensError as error:
                yield {"error": str(error)}
                return
            yield {
                "done": {
                    "gamma": gamma,
                    "k": len(heads),
                    "pieces": written.pieces[0],
                    "shifts": _plain(written.shifts[0].tolist()),
                    "kl": _plain(written.kl[0].tolist()),
                    "alternatives": written.alternatives[0] if written.alternatives else [],
                    "scores": {},
                }
            }


def _plain(values: Sequence[float]) -> list[float | None]:
    """JSON knows no NaN."""
    return [None if math.isnan(value) else value for value in values]
