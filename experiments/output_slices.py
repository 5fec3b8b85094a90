"""A control: "heads" as published detectors cut them, slices of the attention *output*.

Zeroing coordinates `h·d_head … (h+1)·d_head` of what `o_proj` returns removes residual coordinates, to which all
heads of the layer write, and no head. This scores such slices with the same prompts and the same reducer as
`score_heads`, so that the "heads" it ranks first can be ablated as the true heads of that name.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import dps_lens as dps
from dps_lens.data import User
from dps_lens.model import HookedModel
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.scoring import Branches, single_heads
from dps_lens.scoring.branches import row_losses
from dps_lens.scoring.sweep import Sweep


@contextmanager
def slices_removed(model: HookedModel, masks: torch.Tensor):
    """Zero the output slices of each row's masked "heads"; rows join from layer to layer as in `Runner.resume`."""
    width = model.cfg.d_model // model.cfg.n_heads

    def zero(output, hook, layer):
        keep = ~masks[: output.shape[0], layer].repeat_interleave(width, dim=-1)
        return output * keep[:, None].to(output)

    layers = masks.any(0).any(-1).nonzero().flatten().tolist()
    hooks = [(f"blocks.{layer}.attn.o.hook_out", partial(zero, layer=layer)) for layer in layers]
    with model.hooks(fwd_hooks=hooks):
        yield


class SliceBranches(Branches):
    """Branches that lose output slices instead of heads."""

    def _run(self, masks, first, values, where):
        starts = {layer: self.residual(layer).expand(first.count(layer), -1, -1) for layer in dict.fromkeys(first)}
        with slices_removed(self.runner.model, masks):
            logits = self.runner.resume(starts, self.tokens, prompt=self.prompt_cache, keep=len(self.targets))
        return row_losses(logits, self.targets)


def score_slices(
    model: HookedModel, users: Sequence[User], *, prompt: dps.PromptConfig, max_examples: int, out: Path | None
) -> HeadScores:
    """The profile-specific score of every output slice, response positions; resumable."""
    sweep = Sweep(
        model=model,
        users=list(users),
        method="exact",
        exact_layers=0,
        confirm=0.0,
        contrast="no_profile",
        ablation="zero",
        positions="response",
        discovery="history",
        max_examples=max_examples,
        prompt=prompt,
        patch_from="no_profile",
        direction="noising",
        n_donors=1,
        seed=0,
        batch_size="auto",
    )
    fingerprint = sweep.fingerprint() | {"call": "score_slices"}
    folder = RunFolder(out, fingerprint) if out else None
    every, values = single_heads(model.cfg.n_layers, model.cfg.n_heads), []
    for example in sweep.examples:
        key = f"{example.user_id}|{example.id}"
        unit = folder.get(key) if folder else None
        if unit is None:
            change = []
            for profile in ("own", "none"):
                branches = SliceBranches(sweep.runner, sweep.build(example, profile))
                change.append(branches.ablated(every) - branches.nll)
            unit = {"value": (change[0] - change[1]).float().reshape(model.cfg.n_layers, model.cfg.n_heads)}
            if folder:
                folder.put(key, unit)
        values.append(unit["value"])
    scores = HeadScores(
        torch.stack(values),
        example_ids=[example.id for example in sweep.examples],
        user_ids=[example.user_id for example in sweep.examples],
        manifest=fingerprint | {"family": "output slices"},
    )
    if out:
        scores.save(out)
    return scores
