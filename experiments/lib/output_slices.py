"""A control: "heads" as published detectors cut them, slices of the attention *output*.

Zeroing coordinates `h·d_head … (h+1)·d_head` of what `o_proj` returns removes residual coordinates, to which all
heads of the layer write, and no head. This scores such slices with the same prompts and the same reducer as
`score_heads`, so that the "heads" it ranks first can be ablated as the true heads of that name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor

import dps_lens as dps
from dps_lens.data import Prompt
from dps_lens.model import HookedModel, Hooks
from dps_lens.scoring import NLL, CleanRun
from dps_lens.scoring.sweep import Sweep
from dps_lens.work import Engine, Run


@dataclass(frozen=True, repr=False)
class Slices:
    """Zero the output slices of each row's masked "heads"; rows join from layer to layer as in `Runner.resume`."""

    masks: Bool[Tensor, "row layer head"]

    def on(self, model: HookedModel) -> Hooks:
        layers = self.masks.any(0).any(-1).nonzero().flatten().tolist()
        width = model.cfg.d_model // model.cfg.n_heads
        hooks = [(f"blocks.{layer}.attn.o.hook_out", partial(self._zero, layer, width)) for layer in layers]
        return Hooks(model, hooks)

    def _zero(self, layer: int, width: int, output: Float[Tensor, "row pos d_model"], hook: object) -> Tensor:
        keep = ~self.masks[: output.shape[0], layer].repeat_interleave(width, dim=-1)
        return output * keep[:, None].to(output)


class SliceRun(CleanRun):
    """A clean run whose ablations remove output slices instead of heads."""

    def edit(self, masks: Bool[Tensor, "row layer head"]) -> Slices:
        return Slices(masks)


class SliceSweep(Sweep):
    """`score_heads` of slices."""

    def clean_run(self, prompt: Prompt, condition: str) -> SliceRun:
        return SliceRun(self.runner, prompt, batch_size=self.batch_size)

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"call": "score_slices"}


def score_slices(
    model: HookedModel,
    users: Sequence[dps.User],
    *,
    prompt_config: dps.PromptConfig,
    max_examples: int,
    against: Literal["no_profile"] | None = "no_profile",
    score_config: dps.ScoreConfig | None = None,
    out: Path | None = None,
    engine: Engine | None = None,
) -> dps.HeadScores:
    """The score of every output slice at response positions, by default the profile-specific one; resumable."""
    run = Run(model, dps.HeadScores, out, engine)
    sweep = SliceSweep(
        model=model,
        users=list(users),
        ablation=dps.Zero(),
        against=against,
        objective=NLL(),
        positions="response",
        method="exact",
        max_examples=max_examples,
        prompt_config=prompt_config,
        config=score_config or dps.ScoreConfig(),
        seed=0,
        batch_size="auto",
    )
    run.open(sweep.fingerprint)
    units = run.units(sweep, list(sweep.by_key), "scoring output slices")
    return run.keep(sweep.collect(units, run.manifest | {"family": "output slices"}))
