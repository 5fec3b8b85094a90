"""What went wrong: for the log, and in OpenAI's form."""

import logging
import traceback
from typing import Any

LOG = logging.getLogger("dps_lens.serving")


def note_failure(error: BaseException) -> None:
    """Log where a failure came from; what an error of a library says may hold texts, and is left out."""
    system = next((one for one in (error.__cause__, error) if isinstance(one, OSError) and one.strerror), None)
    why = f" ({system.strerror})" if system is not None else ""
    LOG.error("%s%s\n%s", type(error).__name__, why, "".join(traceback.format_tb(error.__traceback__)))


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}


def error_type(status: int) -> str:
    """What OpenAI calls errors of a status."""
    if status in (401, 403):
        return "authentication_error" if status == 401 else "permission_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
