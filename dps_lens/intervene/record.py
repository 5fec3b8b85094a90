"""The z of every head in a clean run."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.errors import InterventionError
from dps_lens.intervene.positions import Where, everywhere, window
from dps_lens.literals import Positions
from dps_lens.model import HookedModel, native_attention, runner_of


@contextmanager
def recording_z(model: HookedModel, where: Where = everywhere) -> Iterator[dict[int, Tensor]]:
    """Collect `z` at the chosen positions of the pass inside; layer → `[row pos head d_head]`."""
    recorded: dict[int, Tensor] = {}

    def keep(layer: int, z: Tensor, hook: object) -> None:
        chosen = where(z.shape[1])
        if isinstance(chosen, slice):
            recorded[layer] = z[:, chosen].detach().clone()

    layers = range(model.cfg.n_layers)
    with model.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_z", partial(keep, layer)) for layer in layers]):
        yield recorded


@torch.inference_mode()
def record_z(
    model: HookedModel, prompt: Prompt, *, positions: Positions = "response"
) -> Float[Tensor, "layer pos head d_head"]:
    """The z of every head over the edited positions of a prompt with its response.

    `Patch(z=…)` takes it as it is, `Mean(z=…)` its mean over positions.
    """
    runner = runner_of(model)
    with native_attention(model), recording_z(model, window(prompt, positions)) as recorded:
        runner.logits(prompt.tokens[None].to(runner.device), keep=1)
    if not recorded:
        raise InterventionError(f"record_z: the prompt has no positions {positions!r}")
    return torch.stack([recorded[layer][0].cpu() for layer in sorted(recorded)])


def response_z(model: HookedModel, prompt: Prompt) -> Float[Tensor, "layer pos head d_head"]:
    """The z of every head, as float32, at the positions that the response is predicted from."""
    # The last token of a response is read, never run.
    return record_z(model, prompt)[:, :-1].float()
