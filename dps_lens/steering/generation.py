"""What `generate` returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.errors import SteeringError
from dps_lens.steering.rules import divergence

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Generation:
    """What `generate` wrote, one entry a prompt.

    Attributes:
        texts: the new text.
        tokens: the new token ids, the end-of-turn token included where there is one.
        logprobs: log-probability of each new token under the steered distribution (before temperature).
        shifts: the same minus its log-probability under the full model: what steering did to it. NaN where the
            full model did not run (γ = −1, `amplify`).
        kl: KL(steered ‖ full) at each step, nats: how hard the steering was; NaN as `shifts`.
        settings: how it was made.
    """

    texts: list[str]
    tokens: list[Int[Tensor, " _"]]
    logprobs: list[Float[Tensor, " _"]]
    shifts: list[Float[Tensor, " _"]]
    kl: list[Float[Tensor, " _"]]
    settings: dict[str, Any]
    _delta_logits: list[Float[Tensor, "_ d_vocab"]] | None = None

    @property
    def delta_logits(self) -> list[Float[Tensor, "_ d_vocab"]]:
        """Steered minus full logits at every step.

        Raises:
            SteeringError: they were not kept.
        """
        if self._delta_logits is None:
            raise SteeringError("delta_logits were not kept; call generate(…, keep_delta_logits=True)")
        return self._delta_logits

    def to_frame(self) -> "pandas.DataFrame":
        """One row a prompt: text, length, mean log-probability, mean shift and mean KL a step."""
        import pandas as pd

        return pd.DataFrame(
            {
                "text": self.texts,
                "tokens": [len(tokens) for tokens in self.tokens],
                "logprob": [float(values.mean()) for values in self.logprobs],
                "shift": [float(values.mean()) for values in self.shifts],
                "kl": [float(values.mean()) for values in self.kl],
            }
        )


@dataclass
class Steps:
    """Collects what a decoding loop chooses, row by row."""

    rows: int
    keep_delta_logits: bool = False
    columns: dict[str, list[list[Tensor]]] = field(default_factory=dict)

    def add(
        self,
        running: Sequence[int],
        chosen: Int[Tensor, " row"],
        full: Float[Tensor, "row d_vocab"],
        steered: Float[Tensor, "row d_vocab"],
    ) -> None:
        """One step of the rows that run."""
        logprob = _logprob(steered, chosen)
        step = {
            "tokens": chosen,
            "logprobs": logprob,
            "shifts": logprob - _logprob(full, chosen),
            "kl": divergence(steered, full),
        }
        if self.keep_delta_logits:
            step["deltas"] = steered - full
        for name, values in step.items():
            column = self.columns.setdefault(name, [[] for _ in range(self.rows)])
            for row, value in zip(running, values.cpu(), strict=True):
                column[row].append(value)

    def generation(self, tokenizer: Any, settings: dict[str, Any]) -> Generation:
        """Everything that was chosen."""
        found = {name: [torch.stack(values) for values in column] for name, column in self.columns.items()}
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in found["tokens"]]
        tokens, logprobs, shifts, kl = (found[name] for name in ("tokens", "logprobs", "shifts", "kl"))
        return Generation(texts, tokens, logprobs, shifts, kl, settings, found.get("deltas"))


def _logprob(logits: Float[Tensor, "row d_vocab"], token: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    return logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
