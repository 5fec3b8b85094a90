"""A control: "heads" as published detectors cut them, slices of the attention *output*.

Zeroing coordinates `h·d_head … (h+1)·d_head` of what `o_proj` returns removes residual coordinates, to which all
heads of the layer write, and no head. This scores such slices with the same prompts and the same reducer as
`score_heads`, so that the "heads" it ranks first can be ablated as the true heads of that name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import dps_lens as dps
from dps_lens.data import Example
from dps_lens.model import HookedModel, Hooks
from dps_lens.runs import RunFolder, kept
from dps_lens.scoring import NLL, CleanRun, single_heads
from dps_lens.scoring.sweep import Sweep


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


def score_slices(
    model: HookedModel,
    users: Sequence[dps.User],
    *,
    prompt_config: dps.PromptConfig,
    max_examples: int,
    out: Path | None = None,
) -> dps.HeadScores:
    """The profile-specific score of every output slice, response positions; resumable."""
    sweep = Sweep(
        model=model,
        users=list(users),
        ablation=dps.Zero(),
        against="no_profile",
        objective=NLL(),
        positions="response",
        method="exact",
        max_examples=max_examples,
        prompt_config=prompt_config,
        config=dps.ScoreConfig(),
        seed=0,
        batch_size="auto",
    )
    fingerprint = sweep.fingerprint() | {"call": "score_slices"}
    folder = RunFolder(out, fingerprint) if out else None
    shape = (model.cfg.n_layers, model.cfg.n_heads)

    def unit(example: Example) -> dict[str, Tensor]:
        change = []
        for condition in ("own", "no_profile"):
            (prompt,) = sweep.prompts(example, condition)
            clean = SliceRun(sweep.runner, prompt)
            change.append(clean.ablated(single_heads(*shape)) - clean.nll)
        return {"value": (change[0] - change[1]).float().reshape(shape)}

    values = [kept(folder, f"{e.user_id}|{e.id}", partial(unit, e))["value"] for e in sweep.examples]
    scores = dps.HeadScores(
        torch.stack(values),
        example_ids=[example.id for example in sweep.examples],
        user_ids=[example.user_id for example in sweep.examples],
        manifest=fingerprint | {"family": "output slices"},
    )
    if out:
        scores.save(out)
    return scores
