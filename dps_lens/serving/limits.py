"""What a server holds at most."""

from dataclasses import dataclass

from dps_lens.checks import check_number, check_whole
from dps_lens.errors import SteeringError


@dataclass(frozen=True)
class Limits:
    """What a server holds at most; what is beyond waits, or is refused.

    Attributes:
        rows: of the batch; a steered text takes two or three.
        positions: of keys and values, rows times the longest; by default what half of the free memory holds.
        waiting: requests that are not in the batch yet.
        tokens: of a text.
        bytes: of a request.
        seconds: that a request may take, from when it comes in.
        chunk: positions of prompts that are run between two steps of the others.
    """

    rows: int = 64
    positions: int | None = None
    waiting: int = 256
    tokens: int = 1024
    bytes: int = 4 * 2**20
    seconds: float = 600.0
    chunk: int = 256

    def __post_init__(self) -> None:
        for name in ("rows", "positions", "waiting", "tokens", "bytes", "chunk"):
            if name != "positions" or self.positions is not None:
                check_whole(SteeringError, f"Limits: {name}", getattr(self, name), least=1)
        check_number(SteeringError, "Limits: seconds", self.seconds, above=0)
