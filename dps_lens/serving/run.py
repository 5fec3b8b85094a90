"""Run the application: in the foreground, or from a thread of this process."""

import logging
import socket
import threading
from typing import Any

import uvicorn

from dps_lens.errors import SteeringError, reason
from dps_lens.serving.keys import Keys
from dps_lens.serving.middleware import is_here

HOST = "127.0.0.1"
_BACKLOG = 512


def check_host(host: str, keys: Keys | None) -> None:
    """Refuse to answer other machines without keys.

    Raises:
        SteeringError: the address is no loopback one, and there are no keys.
    """
    if not is_here(host) and not (keys and keys.keys):
        raise SteeringError(
            f"serve: {host} can be reached from other machines; make a key with 'dps-lens key NAME --keys FILE' and "
            "give --keys FILE"
        )


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens at an address, before the work that a server takes; who connects waits for it.

    Raises:
        SteeringError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise SteeringError(
            f"serve: port {port} of {host} cannot be had ({reason(error)}); --port 0 takes a free one"
        ) from error
    return found


def server_of(app: Any, *, patience: int = 30) -> uvicorn.Server:
    """What serves an application until it is told to stop; answers that are being written are then finished, for so
    many seconds."""
    # Its lines hold addresses, and so the names of users.
    logging.getLogger("uvicorn.access").disabled = True
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=patience,
        )
    )


class Served:
    """An application that is served from a thread of this process, to this machine only, until it is closed.

    Args:
        app: of `make_server`.
        port: of 127.0.0.1; 0 takes a free one.

    Attributes:
        url: where it is; OpenAI's clients take `url + "/v1"`.

    Raises:
        SteeringError: the port is taken, or the application did not start.
    """

    def __init__(self, app: Any, port: int = 0) -> None:
        self._socket = bound(HOST, port)
        self.url = f"http://{HOST}:{self._socket.getsockname()[1]}"
        self._server = server_of(app)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.02)
            if not self._thread.is_alive():
                self._socket.close()
                raise SteeringError("serve: the application did not start; its log says why")

    def close(self) -> None:
        """Finish the answers that are being written, and stop."""
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
