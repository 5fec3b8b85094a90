"""Choose the next token of each row from steered logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dps_lens.checks import check_number, check_seed, check_whole
from dps_lens.errors import SteeringError


@dataclass(frozen=True)
class Sampling:
    """How a row is sampled; without one it is decoded greedily.

    A row draws one uniform number a step and inverts its own distribution, so that what it samples
    depends on its seed and its logits, never on its neighbours in the batch.

    Attributes:
        temperature: divides the logits.
        top_k: keep the `top_k` largest.
        top_p: keep the smallest set of tokens whose probability reaches `top_p`.
        seed: of the row's numbers.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        greedy = "leave sampling out for greedy decoding"
        check_number(SteeringError, "Sampling: temperature", self.temperature, above=0, why=greedy)
        if self.top_k is not None:
            check_whole(SteeringError, "Sampling: top_k", self.top_k, least=1)
        if self.top_p is not None:
            check_number(SteeringError, "Sampling: top_p", self.top_p, above=0, most=1)
        check_seed(SteeringError, "Sampling: seed", self.seed)

    @cached_property
    def _warpers(self) -> Any:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

        top_k = [TopKLogitsWarper(self.top_k)] if self.top_k is not None else []
        return LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature)), *top_k])

    def probabilities(self, logits: Float[Tensor, "row d_vocab"]) -> Float64[Tensor, "row d_vocab"]:
        """The distribution that is sampled: temperature, then top_k, then top_p."""
        # A small temperature would make infinities, whose difference is none, of logits that are not shifted to 0.
        shifted = logits.double() - logits.double().amax(-1, keepdim=True)
        probabilities = self._warpers(None, shifted).softmax(-1)
        if self.top_p is None:
            return probabilities
        # Not the warper of transformers: it sorts without keeping the order of equal tokens.
        ordered, index = probabilities.sort(descending=True, stable=True)
        # A token stays when the ones before it have not reached top_p; the first always stays.
        dropped = ordered.cumsum(-1) - ordered >= self.top_p
        probabilities = probabilities.masked_fill(dropped.scatter(-1, index, dropped), 0)
        return probabilities / probabilities.sum(-1, keepdim=True)

    def draw(self, logits: Float[Tensor, "row d_vocab"], generators: Sequence[torch.Generator]) -> Int[Tensor, " row"]:
        """The next token of each row."""
        uniform = torch.stack([torch.rand((), dtype=torch.float64, generator=generator) for generator in generators])
        cdf = self.probabilities(logits).cumsum(-1)
        drawn = torch.searchsorted(cdf, (uniform.to(cdf.device) * cdf[:, -1])[:, None], right=True)[:, 0]
        return drawn.clamp(max=logits.shape[-1] - 1)


class Chooser:
    """Chooses tokens of a batch, each row by its own sampling and numbers."""

    def __init__(self, samplings: Sequence[Sampling | None]) -> None:
        self._samplings = list(samplings)
        seeds = [sampling.seed if sampling else 0 for sampling in samplings]
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def __call__(self, logits: Float[Tensor, "row d_vocab"], running: Sequence[int]) -> Int[Tensor, " row"]:
        """The next token of the rows that run; rows of one setting are drawn together."""
        chosen = logits.argmax(-1)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, row in enumerate(running):
            if (one := self._samplings[row]) is not None:
                groups.setdefault((one.temperature, one.top_k, one.top_p), []).append(place)
        for places in groups.values():
            rows = [running[place] for place in places]
            sampling = self._samplings[rows[0]]
            if sampling is not None:
                chosen[places] = sampling.draw(logits[places], [self._generators[row] for row in rows])
        return chosen
