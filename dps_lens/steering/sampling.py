"""Choose the next token of each row from steered logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dps_lens.errors import SteeringError


@dataclass(frozen=True)
class Sampler:
    """Greedy choice, or sampling with one generator a row.

    A row draws one uniform number a step and inverts its own distribution, so that what it samples
    depends on its seed and its logits, never on its neighbours in the batch.

    Attributes:
        do_sample: sample instead of taking the largest logit.
        temperature: divides the logits.
        top_k: keep the `top_k` largest.
        top_p: keep the smallest set of tokens whose probability reaches `top_p`.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.do_sample and self.temperature <= 0:
            raise SteeringError(
                f"temperature {self.temperature} is not positive; use do_sample=False for greedy decoding"
            )
        if self.top_k is not None and self.top_k < 1:
            raise SteeringError(f"top_k {self.top_k} keeps no token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SteeringError(f"top_p {self.top_p} is not in (0, 1]")

    def probabilities(self, logits: Float[Tensor, "row d_vocab"]) -> Float64[Tensor, "row d_vocab"]:
        """The distribution that is sampled: temperature, then top_k, then top_p."""
        scaled = logits.double() / self.temperature
        if self.top_k is not None and self.top_k < scaled.shape[-1]:
            smallest = scaled.topk(self.top_k).values[:, -1:]
            scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
        probabilities = scaled.softmax(-1)
        if self.top_p is not None:
            ordered, index = probabilities.sort(descending=True, stable=True)
            # A token stays when the ones before it have not reached top_p; the first always stays.
            dropped = ordered.cumsum(-1) - ordered >= self.top_p
            probabilities = probabilities.masked_fill(dropped.scatter(-1, index, dropped), 0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities

    def __call__(
        self, logits: Float[Tensor, "row d_vocab"], generators: Sequence[torch.Generator]
    ) -> Int[Tensor, " row"]:
        """The next token of each row."""
        if not self.do_sample:
            return logits.argmax(-1)
        uniform = torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators])
        cdf = self.probabilities(logits).cumsum(-1)
        drawn = torch.searchsorted(cdf, (uniform.to(cdf.device) * cdf[:, -1])[:, None], right=True)[:, 0]
        return drawn.clamp(max=logits.shape[-1] - 1)


def choose(
    logits: Float[Tensor, "row d_vocab"], samplers: Sequence[Sampler], generators: Sequence[torch.Generator]
) -> Int[Tensor, " row"]:
    """The next token of each row by its own sampler; rows of one setting are drawn together."""
    chosen = logits.new_empty(len(logits), dtype=torch.long)
    for sampler in dict.fromkeys(samplers):
        rows = [row for row, other in enumerate(samplers) if other == sampler]
        if len(rows) == len(logits):
            return sampler(logits, generators)
        chosen[rows] = sampler(logits[rows], [generators[row] for row in rows])
    return chosen
