"""Numbers for Prometheus; none is of a user."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dps_lens.serving.answer import Piece

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_NATS = (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Metrics:
    """What a server counts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "dps_lens_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.tokens = Counter("dps_lens_tokens", "Tokens that were written.", registry=registry)
        self.waiting = Gauge("dps_lens_waiting", "Requests that wait for the batch.", registry=registry)
        self.rows = Gauge("dps_lens_rows", "Rows of the batch.", registry=registry)
        self.first = Histogram(
            "dps_lens_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, registry=registry
        )
        self.token = Histogram(
            "dps_lens_token_seconds", "From one token of a text to the next.", buckets=_SECONDS, registry=registry
        )
        self.kl = Histogram(
            "dps_lens_kl_nats", "KL(steered || full) of a step, nats.", buckets=_NATS, registry=registry
        )

    def wrote(self, piece: Piece, seconds: float, *, first: bool) -> None:
        """Count a piece of a text, which came so long after what was before it."""
        self.tokens.inc(len(piece.tokens))
        (self.first if first else self.token).observe(seconds)
        for token in piece.tokens:
            if token.kl is not None:
                self.kl.observe(max(token.kl, 0.0))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
