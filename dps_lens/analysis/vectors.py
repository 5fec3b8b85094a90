"""Preference vectors: the mean output of a user's heads, added where there is no profile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.analysis.effects import SetEffects
from dps_lens.analysis.rankings import Family, Select
from dps_lens.analysis.set_sweep import Condition, EditSweep
from dps_lens.data import Example, PromptConfig, User, build_prompt
from dps_lens.errors import HeadError, ScoreError
from dps_lens.heads import HeadSet
from dps_lens.intervene import record_z
from dps_lens.model import HookedModel, native_attention
from dps_lens.scoring.branches import BatchSize, Branches, row_losses
from dps_lens.scoring.sweep import donors_of


def preference_vector(
    model: HookedModel,
    user: User,
    heads: HeadSet,
    *,
    max_examples: int | None = 4,
    prompt: PromptConfig | None = None,
) -> Float[Tensor, " d_model"]:
    """`Σ_h mean(z_h) W_O[h]` over the response positions of a user's discovery examples, own profile shown.

    The form of a function vector (Todd et al. 2023, arXiv 2310.15213), for a user instead of a task.

    Args:
        model: a hooked model.
        user: whose discovery examples are read; never the evaluation examples.
        heads: the heads.
        max_examples: the newest so many discovery examples.
        prompt: how prompts are built.

    Raises:
        ScoreError: the user has no discovery example.
        HeadError: a head lies outside the model.
    """
    mask = heads.mask(model.cfg)
    return head_outputs(model, user, max_examples=max_examples, prompt=prompt)[mask].sum(0)


@torch.no_grad()
def head_outputs(
    model: HookedModel, user: User, *, max_examples: int | None = 4, prompt: PromptConfig | None = None
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
    for example in examples[-max_examples:] if max_examples else examples:
        z = record_z(model, build_prompt(model, example, config=prompt))[:, :-1].float()
        total, count = total + z.sum(1), count + z.shape[1]
    mean = total / count
    outputs = [torch.einsum("hd,hde->he", mean[index], _w_o(model, index)) for index in range(model.cfg.n_layers)]
    return torch.stack(outputs)


def _w_o(model: HookedModel, layer: int) -> Float[Tensor, "head d_head d_model"]:
    return model.blocks[layer].attn.W_O.detach().float().cpu()


def vector_recovery(
    model: HookedModel,
    users: Sequence[User],
    families: Mapping[str, Family],
    *,
    ks: Sequence[int] = (10,),
    layer: int | None = None,
    scale: float = 1.0,
    n_random: int = 20,
    select: Select | Mapping[str, Select] = "global",
    exclude: Mapping[str, HeadSet] | None = None,
    vector_examples: int | None = 4,
    max_examples: int | None = None,
    prompt: PromptConfig | None = None,
    ngram: int = 2,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    out: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> SetEffects:
    """Add preference vectors to evaluation examples without profile: how much of the gain comes back.

    A head that abstracts a user should bring it back; one that copies from the profile should not. Beside
    them: vectors of random heads, and of another user. Other arguments as in `ablation_curve`.

    Args:
        layer: the vector is added to the residual stream that enters this layer, at the response positions; a
            third of the way up by default, as for function vectors.
        scale: of the vector.
        vector_examples: the newest so many discovery examples a vector is the mean of.

    Raises:
        HeadError: the layer is not in the model.
        ScoreError: as `ablation_curve`, or a user without discovery examples.
    """
    at = model.cfg.n_layers // 3 if layer is None else layer
    if not 0 <= at < model.cfg.n_layers:
        raise HeadError(f"vector_recovery: layer {at} is not in this model of {model.cfg.n_layers} layers")
    sets = VectorSweep.of(
        "vector_recovery",
        model,
        users,
        families,
        ks,
        prompt=prompt,
        n_random=n_random,
        select=select,
        exclude=exclude,
        max_examples=max_examples,
        ngram=ngram,
        seed=seed,
        batch_size=batch_size,
        layer=at,
        scale=scale,
        vector_examples=vector_examples,
    )
    sets.positions = "response"  # where vectors are added, whatever the scores were measured at
    for user in tqdm(sets.users, desc="preference vectors", unit="user", disable=None if progress else True):
        sets.outputs[user.id] = scale * head_outputs(model, user, max_examples=vector_examples, prompt=sets.prompt)

    return sets.run(out, force, progress)


@dataclass
class VectorSweep(EditSweep):
    """The sweep of `vector_recovery`."""

    layer: int = 0
    scale: float = 1.0
    vector_examples: int | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def conditions(self, number: int, example: Example) -> dict[str, Condition]:
        branches = self.branches(example, "none")
        donor = donors_of(example, self.users, 1, self.seed)
        add = partial(added, branches, self.layer)
        found = {"vector": Condition("no_profile", branches, partial(add, self.outputs[example.user_id]), True)}
        if donor:
            found["vector (other)"] = Condition("no_profile", branches, partial(add, self.outputs[donor[0].id]))
        found["own"] = Condition("own", self.branches(example, "own"))
        return found

    def more(self) -> dict[str, Any]:
        return {"layer": self.layer, "scale": self.scale, "vector_examples": self.vector_examples}


@torch.inference_mode()
def added(
    branches: Branches,
    layer: int,
    outputs: Float[Tensor, "layer head d_model"],
    masks: Bool[Tensor, "row layer head"],
) -> Float64[Tensor, "row pos"]:
    """Losses of the response when the summed outputs of each row's heads enter the residual stream at a layer."""
    found = []
    with native_attention(branches.runner.model):
        residual = branches.residual(layer)
        for rows in masks.split(branches.batch_size):
            vectors = torch.einsum("rlh,lhd->rd", rows.float(), outputs).to(residual)
            logits = branches.runner.resume(
                {layer: residual + vectors[:, None]},
                branches.tokens,
                prompt=branches.prompt_cache,
                keep=len(branches.targets),
            )
            found.append(row_losses(logits, branches.targets))
    return torch.cat(found)
