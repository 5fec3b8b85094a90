"""Preference vectors: the mean output of a user's heads."""

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data import PromptConfig, User, build_prompt
from dps_lens.data.examples import newest
from dps_lens.errors import ScoreError
from dps_lens.heads import HeadSet
from dps_lens.intervene import response_z
from dps_lens.model import HookedModel


def preference_vector(
    model: HookedModel,
    user: User,
    heads: HeadSet,
    *,
    max_examples: int | None = 4,
    prompt_config: PromptConfig | None = None,
) -> Float[Tensor, " d_model"]:
    """`Σ_h mean(z_h) W_O[h]` over the response positions of a user's discovery examples, own profile shown.

    The form of a function vector (Todd et al. 2023, arXiv 2310.15213), for a user instead of a task.

    Args:
        model: a hooked model.
        user: whose discovery examples are read; never the evaluation examples.
        heads: the heads.
        max_examples: the newest so many discovery examples.
        prompt_config: how prompts are built.

    Raises:
        ScoreError: the user has no discovery example.
        HeadError: a head lies outside the model.
    """
    mask = heads.mask(model.cfg)
    return head_outputs(model, user, max_examples=max_examples, prompt_config=prompt_config)[mask].sum(0)


@torch.no_grad()
def head_outputs(
    model: HookedModel, user: User, *, max_examples: int | None = 4, prompt_config: PromptConfig | None = None
) -> Float[Tensor, "layer head d_model"]:
    """Mean of `z W_O` of every head over the response positions of a user's discovery examples, as float32.

    Raises:
        ScoreError: the user has no discovery example.
    """
    examples = user.discovery_examples()
    if not examples:
        raise ScoreError(f"preference_vector: user {user.id!r} has no discovery example; leave the user out")
    total: Tensor = torch.zeros(())
    count = 0
    for example in newest(examples, max_examples):
        z = response_z(model, build_prompt(model, example, config=prompt_config))
        total, count = total + z.sum(1), count + z.shape[1]
    mean = total / count
    outputs = [torch.einsum("hd,hde->he", mean[index], _w_o(model, index)) for index in range(model.cfg.n_layers)]
    return torch.stack(outputs)


def _w_o(model: HookedModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    return model.blocks[layer].attn.W_O.detach().float().cpu()
