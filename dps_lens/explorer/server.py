"""The same page with a live model behind it, on this machine only."""

import importlib.util
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dps_lens.data import User
from dps_lens.data.examples import unit_key
from dps_lens.errors import DPSLensError, SteeringError, reason
from dps_lens.explorer.ask import Asker
from dps_lens.explorer.code import Origin
from dps_lens.explorer.describe import Describer
from dps_lens.explorer.line import PATIENCE, BusyError, Line
from dps_lens.explorer.page import FRAME, Exploration, page
from dps_lens.explorer.question import ABLATED_BY, Refused
from dps_lens.explorer.writer import Writer
from dps_lens.files import parse_json
from dps_lens.model import HookedModel, ModelThread
from dps_lens.vectors import HeadVectors

Q = TypeVar("Q")

HOST = "127.0.0.1"
_LINE = "dps_lens line"
# A notebook of this machine may show the page.
_FRAMED_BY = "frame-ancestors 'self' http://localhost:* http://127.0.0.1:*"


def make_app(
    model: HookedModel,
    users: Sequence[User],
    found: Exploration,
    origin: Origin | None = None,
    vectors: HeadVectors | None = None,
    thread: ModelThread | None = None,
) -> Any:
    """A Flask application with the page at `/`; `POST /ask` and `/write` answer questions, `/steer` writes one text.

    `/prepare` reads what is about to be asked, as long as nobody waits; `/describe` says what a head does.

    Args:
        model: the model that was explored.
        users: those of the page.
        found: of `explore`; its grid names the rule, the examples and the length of a text.
        origin: of the model and the users, for the lines that the page offers.
        vectors: of the users, at heads, to steer with.
        thread: where the model runs, best the one that loaded it; one of its own by default.

    Raises:
        SteeringError: flask is not installed, or the exploration holds no texts.
    """
    check_flask()
    from flask import Flask, Response, jsonify, request
    from werkzeug.exceptions import HTTPException

    if found.grid is None:
        raise SteeringError("explore: the exploration holds no texts to steer; make it with a grid")
    app, writer, line = Flask("dps_lens"), Writer(model, users, found, origin), Line(thread)
    asker = Asker(model, users, writer.config, origin, vectors)
    describer = Describer(model, users, writer.config, origin)
    app.config["MAX_CONTENT_LENGTH"] = 2**22
    app.extensions[_LINE] = line
    shown = page(found, live=_questions(asker, writer))

    @app.before_request
    def only_here() -> Any:
        # A page of another site may know this address, but not pretend to be it.
        here = (HOST, "localhost")
        sender = request.headers.get("Origin")
        foreign = sender is not None and urlsplit(sender).netloc != request.host
        if request.host.partition(":")[0] not in here or foreign:
            return jsonify(error="open the page at 127.0.0.1"), 403
        return None

    @app.after_request
    def shut(response: Any) -> Any:
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Content-Security-Policy"] = _FRAMED_BY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    @app.errorhandler(HTTPException)
    def told(error: Any) -> Any:
        return jsonify(error=error.description), error.code

    @app.get("/")
    def index() -> Any:
        return Response(shown, mimetype="text/html")

    def answered(read: Callable[[object], Q], answer: Callable[[Q], Iterator[dict[str, Any]]]) -> Any:
        """An answer line by line, as soon as it is this request's turn."""
        # Other sites cannot send JSON without being asked for permission.
        text = request.get_data(as_text=True) if request.is_json else "null"
        try:
            asked = read(parse_json(text, "ask", SteeringError))
            ticket = line.join()
        except Refused as error:
            return jsonify(error=error.reason, field=error.field), 400
        except BusyError as error:
            return jsonify(error=str(error)), 429
        except DPSLensError as error:
            return jsonify(error=str(error)), 400
        lines = (json.dumps(one, allow_nan=False) + "\n" for one in line.served(ticket, lambda: answer(asked)))
        response = Response(lines, mimetype="application/x-ndjson")
        response.call_on_close(lambda: line.leave(ticket))
        return response

    @app.post("/ask")
    def ask() -> Any:
        return answered(asker.read, asker.measure)

    @app.post("/prepare")
    def prepare() -> Any:
        return answered(asker.read, lambda asked: asker.prepare(asked, lambda: line.waited_for))

    @app.post("/describe")
    def describe() -> Any:
        return answered(describer.read, lambda asked: describer.describe(*asked))

    @app.post("/write")
    def write() -> Any:
        return answered(asker.read, asker.write)

    @app.post("/steer")
    def steer() -> Any:
        return answered(writer.asked, lambda asked: writer.write(*asked))

    return app


def _questions(asker: Asker, writer: Writer) -> dict[str, Any]:
    """What the form of a live page starts from: the examples that are shown, and what may be chosen."""
    assert writer.grid is not None
    examples = [
        {"key": unit_key(one), "user": one.user_id, "example": one.id, "prompt": one.input, "text": one.reference}
        for one in writer.examples.values()
    ]
    length = writer.grid.manifest["max_new_tokens"]
    return {
        "examples": examples,
        "users": [user.id for user in asker.users],
        "ablations": ABLATED_BY,
        "rules": asker.rules,
        "length": length,
        "most": writer.most,
    }


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


def serve(
    model: HookedModel,
    users: Sequence[User],
    found: Exploration,
    *,
    vectors: HeadVectors | None = None,
    port: int = 0,
) -> "LivePage":
    """Serve a page from a thread of this process, with the model behind it, to this machine only.

    Shown in a notebook, what is returned is the page. The model answers one question at a time, and reads what is
    about to be asked while the page's Ask tab is looked at; meanwhile, cells that use it are refused.

    Args:
        model: that was explored.
        users: those of `explore`.
        found: of `explore`, with texts.
        vectors: of the users, of `head_vectors`, to steer with.
        port: of 127.0.0.1; 0 takes a free one.

    Raises:
        SteeringError: flask is not installed, the port is taken, or there are no texts to steer.
    """
    return LivePage(make_app(model, users, found, vectors=vectors), port)


class LivePage:
    """A page that is served from a thread of this process until it is closed.

    Args:
        app: of `make_app`.
        port: of 127.0.0.1; 0 takes a free one.

    Attributes:
        url: where it is.

    Raises:
        SteeringError: the port is taken.
    """

    def __init__(self, app: Any, port: int = 0) -> None:
        from werkzeug.serving import make_server

        check_port(port)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = make_server(HOST, port, app, threaded=True)
        self.url = f"http://{HOST}:{self._server.port}/"
        self._line: Line | None = app.extensions.get(_LINE)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is closed, or interrupted."""
        while self._thread.is_alive():
            self._thread.join(PATIENCE)

    def close(self) -> None:
        """End it; a text that is being written ends with it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if self._line is not None:
            self._line.close()

    def __enter__(self) -> "LivePage":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LivePage({self.url})"

    def _repr_html_(self) -> str:
        """The page inside a notebook of this machine."""
        return f'<iframe src="{self.url}" {FRAME}></iframe>'
