"""Attention sinks (arXiv 2309.17453): heads by how much they attend to the first token."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import dps_lens as dps

TEXTS = (
    "The ferry leaves at six and comes back at noon, except on days when the wind stands in the west.",
    "Cut the pears into quarters, leave the skin on, and put them into the oven before it is hot.",
)


@dataclass(frozen=True)
class FirstToken:
    """Mean attention to the first token, from every later token of each text."""

    name: ClassVar[str] = "first_token"
    unit: ClassVar[str] = "mean attention"
    texts: tuple[str, ...] = TEXTS

    def settings(self) -> dict[str, Any]:
        return {"texts": self.texts}

    @torch.inference_mode()
    def score(self, model: Any, *, folder: Any = None, engine: Any = None, progress: bool = True) -> dps.HeadScores:
        values = torch.zeros(len(self.texts), model.cfg.n_layers, model.cfg.n_heads)
        for row, text in zip(values, self.texts, strict=True):

            def keep(pattern: torch.Tensor, hook: Any, row: torch.Tensor = row) -> None:
                row[hook.layer()] = pattern[0, :, 1:, 0].mean(-1)

            model.run_with_hooks(model.to_tokens(text), fwd_hooks=[(lambda name: name.endswith("hook_pattern"), keep)])
        return dps.HeadScores(values, example_ids=self.texts, user_ids=self.texts)
