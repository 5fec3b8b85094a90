"""What `generate` returns."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.errors import SteeringError
from dps_lens.result import Result
from dps_lens.steering.terms import kl_divergence

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class Generation(Result):
    """What `generate` wrote, one entry a prompt.

    Attributes:
        texts: the new text.
        tokens: the new token ids, the end-of-turn token included where there is one.
        logprobs: log-probability of each new token under the steered distribution (before temperature).
        shifts: the same minus its log-probability under the full model: what steering did to it. NaN where the
            full model did not run (γ = −1, `amplify`, `vector`).
        kl: KL(steered ‖ full) at each step, nats: how hard the steering was; NaN as `shifts`.
        pieces: the text of each new token.
        alternatives: for each step, tokens by what steering did to their probability, most gained first, most lost
            last: `(piece, p steered − p full)`; empty unless kept.
        manifest: how it was made.
    """

    stem: ClassVar[str] = "generation"
    figure: ClassVar[str] = "token_shift"
    error: ClassVar[type[SteeringError]] = SteeringError

    texts: list[str]
    tokens: list[Int[Tensor, " _"]]
    logprobs: list[Float[Tensor, " _"]]
    shifts: list[Float[Tensor, " _"]]
    kl: list[Float[Tensor, " _"]]
    pieces: list[list[str]]
    alternatives: list[list[list[tuple[str, float]]]] = field(default_factory=list)
    _delta_logits: list[Float[Tensor, "_ d_vocab"]] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        tokens = sum(len(one) for one in self.tokens)
        return f"{len(self.texts)} texts of {tokens} tokens by rule {self.manifest.get('rule')!r}"

    @property
    def delta_logits(self) -> list[Float[Tensor, "_ d_vocab"]]:
        """Steered minus full logits at every step.

        Raises:
            SteeringError: they were not kept.
        """
        if self._delta_logits is None:
            raise SteeringError(
                "delta_logits were not kept; call generate(…, decode_config=DecodeConfig(keep_delta_logits=True))"
            )
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

    tokenizer: Any
    rows: int
    keep_delta_logits: bool
    keep_alternatives: int
    settings: dict[str, Any]
    keep_likeliest: int = 0
    columns: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    ended: bool = False
    _ids: dict[int, list[int]] = field(default_factory=dict)
    _shown: dict[int, str] = field(default_factory=dict)

    def add(
        self,
        running: Sequence[int],
        chosen: Int[Tensor, " row"],
        full: Float[Tensor, "row d_vocab"],
        steered: Float[Tensor, "row d_vocab"],
    ) -> list[int]:
        """One step of the rows that run; returns the tokens.

        Raises:
            SteeringError: steered logits are NaN or infinite; names the prompt and the step.
        """
        logprob = _logprob(steered, chosen)
        numbers = torch.stack([logprob, logprob - _logprob(full, chosen), kl_divergence(steered, full)])
        # One transfer: token ids, far below 2²⁴, are exact in float32.
        ids, *measured = torch.cat([chosen[None].float(), numbers]).cpu()
        tokens = ids.long()
        # NaN, +inf, and -inf everywhere all make log-probabilities that are no numbers.
        for row, value in zip(running, measured[0].tolist(), strict=True):
            if not math.isfinite(value):
                raise SteeringError(
                    f"generate: the logits of prompt {row} at step {self.steps_of(row)} are NaN or infinite; lower the "
                    "strength, load the model in float32 or bfloat16, or let check_model(model) look at its weights"
                )
        step = {"tokens": tokens, **dict(zip(("logprobs", "shifts", "kl"), measured, strict=True))}
        if self.keep_delta_logits:
            step["deltas"] = (steered - full).cpu()
        if self.keep_alternatives:
            change = steered.softmax(-1) - full.softmax(-1)
            up, down = change.topk(self.keep_alternatives), (-change).topk(self.keep_alternatives)
            step["moved"] = torch.cat([up.indices, down.indices.flip(-1)], dim=-1).cpu()
            step["moves"] = torch.cat([up.values, -down.values.flip(-1)], dim=-1).cpu()
        if self.keep_likeliest:
            likeliest = steered.log_softmax(-1).topk(self.keep_likeliest)
            step["likeliest"], step["likeliest_logprobs"] = likeliest.indices.cpu(), likeliest.values.cpu()
        for name, values in step.items():
            column = self.columns.setdefault(name, [[] for _ in range(self.rows)])
            for row, value in zip(running, values, strict=True):
                column[row].append(value)
        for row, token in zip(running, tokens.tolist(), strict=True):
            self._ids.setdefault(row, []).append(token)
        return list(tokens.tolist())

    def steps_of(self, row: int) -> int:
        """Tokens that a row has written so far."""
        return len(self.columns["tokens"][row]) if self.columns else 0

    def text(self, row: int) -> str:
        """What a row has written so far."""
        return str(self.tokenizer.decode(self._ids[row], skip_special_tokens=True))

    def more(self, row: int, *, last: bool = False) -> str:
        """What a row has written since this was asked before; a character that is still incomplete waits for its next
        token, unless there is none."""
        text, shown = self.text(row), self._shown.get(row, "")
        if (text.endswith("\ufffd") and not last) or len(text) <= len(shown):
            return ""
        self._shown[row] = text
        return text[len(shown) :]

    def generation(self) -> Generation:
        """Everything that was chosen."""
        columns = {name: [torch.stack(values) for values in column] for name, column in self.columns.items()}
        alternatives = [
            [
                # Where the full model did not run, nothing is known to have moved.
                [(self.tokenizer.decode([token]), by) for token, by in zip(*step, strict=True) if not math.isnan(by)]
                for step in zip(ids.tolist(), changes.tolist(), strict=True)
            ]
            for ids, changes in zip(columns.get("moved", []), columns.get("moves", []), strict=True)
        ]
        return Generation(
            texts=[self.text(row) for row in range(self.rows)],
            tokens=columns["tokens"],
            logprobs=columns["logprobs"],
            shifts=columns["shifts"],
            kl=columns["kl"],
            pieces=[[self.tokenizer.decode([token]) for token in row.tolist()] for row in columns["tokens"]],
            alternatives=alternatives,
            _delta_logits=columns.get("deltas"),
            manifest=self.settings,
        )


class TextStream:
    """Iterates over `(row, new text)` while the text is written; an end of the loop ends the generation.

    A character that is still incomplete waits for its next token. Between two pieces nothing of the stream is on the
    model, so that other calls, and other streams, may run in between; a stream that is left needs no clean-up.
    """

    def __init__(self, written: Iterator[list[int]], steps: Steps) -> None:
        self._steps, self._pieces = steps, _pieces(written, steps)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        return self._pieces

    @property
    def generation(self) -> Generation:
        """The whole, once the text is written.

        Raises:
            SteeringError: the stream has not ended.
        """
        if not self._steps.ended:
            raise SteeringError("the stream has not ended; iterate over it first")
        return self._steps.generation()


def _pieces(written: Iterator[list[int]], steps: Steps) -> Iterator[tuple[int, str]]:
    """New text as rows get tokens; it knows nothing of its stream, so that no cycle keeps a left one alive."""
    for running in written:
        for row in running:
            if text := steps.more(row):
                yield row, text
    for row in range(steps.rows):
        if rest := steps.more(row, last=True):
            yield row, rest
    steps.ended = True


def _logprob(logits: Float[Tensor, "row d_vocab"], token: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    return logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
