"""What `generate` was asked for, one prompt after the other, and the rows of the batch that answer it."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.data.tokenizer import start_token
from dps_lens.errors import SteeringError
from dps_lens.heads import Head, HeadSet
from dps_lens.intervene import Ablation, Patch, Zero
from dps_lens.literals import Positions
from dps_lens.model import HookedModel
from dps_lens.steering.decoder import Row
from dps_lens.steering.rules import Rule
from dps_lens.steering.sampling import Sampling
from dps_lens.steering.terms import Branch
from dps_lens.steering.vector import HeadVector, SteeringVector, Vector

Heads: TypeAlias = HeadSet | Mapping[Head, float]
"""A set of heads, or heads with weights from 0 (untouched) to 1 (all of the edit)."""

Prompts: TypeAlias = Prompt | str | Sequence[Prompt | str]


def rows_of(
    model: HookedModel,
    batch: Sequence[Prompt | str],
    others: Sequence[Prompt | str],
    sets: Sequence[Heads],
    added: Sequence[Vector | None],
    gammas: Sequence[float],
    alphas: Sequence[float],
    rule: Rule,
    ablation: Ablation,
    positions: Positions,
) -> list[Row]:
    """Rows of the batch: what is written from, then what it is contrasted with, for the requests that need it."""
    untouched = torch.ones(model.cfg.n_layers, model.cfg.n_heads)
    in_place, ablating = rule.in_place, rule.ablating
    rows: dict[Branch, list[Row]] = {"full": [], "scaled": [], "ablated": [], "negative": []}
    ids_of = lru_cache(maxsize=None)(partial(_ids, model))  # several texts of one prompt are asked for at once
    for request, (prompt, other, heads, vector) in enumerate(zip(batch, others, sets, added, strict=True)):
        tokens, profile, gamma, alpha = ids_of(prompt), _profile(prompt), gammas[request], alphas[request]
        # A strength of -1 leaves the masked model alone, where it is what was given.
        only = ablating is not None and not rule.adaptive and len(rule.terms) == 1 and gamma == -1
        changed = in_place is not None and gamma != 0
        masked = ablating is not None and (alpha if rule.by_alpha(ablating) else gamma) != 0
        if (changed or masked) and positions == "profile" and profile[0] == profile[1]:
            raise SteeringError("generate: positions='profile' needs prompts that show a profile")
        if not changed and not only:
            rows["full"].append(Row(request, "full", tokens, profile, untouched))
        scaled = rule.has("scaled")
        factors = _factors(model, heads, gamma if scaled else -1.0, ablation)
        additions = vector.additions(gamma) if vector and changed else {}
        if changed and in_place is not None:
            of_branch = factors if scaled else untouched
            rows["scaled"].append(Row(request, in_place.branch, tokens, profile, of_branch, additions))
        if masked:
            # The model that is steered, with the vector that is added to it, without its heads.
            rows["ablated"].append(Row(request, "ablated", tokens, profile, factors, additions))
        if (rule.has("negative") and alpha) or (isinstance(ablation, Patch) and masked):
            ids = ids_of(other)
            if ids.tolist() == tokens.tolist():
                raise SteeringError(
                    f"generate: prompt {request} and its negative prompt are the same; the contrast would be nothing"
                )
            rows["negative"].append(Row(request, "negative", ids, _profile(other), untouched))
    return [row for of_branch in rows.values() for row in of_branch]


def _factors(model: HookedModel, heads: Heads, change: float, ablation: Ablation) -> Float[Tensor, "layer head"]:
    """What z of each head is multiplied by: 1 + weight · change."""
    weights = {head: 1.0 for head in heads} if isinstance(heads, HeadSet) else dict(heads)
    HeadSet(weights).mask(model.cfg)
    if any(not 0 <= weight <= 1 for weight in weights.values()):
        raise SteeringError("generate: weights of heads lie between 0 (untouched) and 1")
    if not isinstance(ablation, Zero) and any(weight not in (0, 1) for weight in weights.values()):
        raise SteeringError(
            f"generate: ablation {ablation.name!r} edits a head as a whole; use weights 0 and 1, or 'zero'"
        )
    factors = torch.ones(model.cfg.n_layers, model.cfg.n_heads)
    for head, weight in weights.items():
        factors[head] = 1 + weight * change
    return factors


def head_sets(heads: Heads | Sequence[Heads] | None, rows: int, rule: Rule) -> list[Heads]:
    if not rule.needs_heads:
        return [HeadSet()] * rows
    if heads is None:
        raise SteeringError("generate: this rule needs heads=, such as scores.top(10)")
    sets: list[Heads] = [heads] * rows if isinstance(heads, (HeadSet, Mapping)) else list(heads)
    if len(sets) != rows:
        raise SteeringError(f"generate: {rows} prompts and {len(sets)} head sets; give one set for each prompt")
    return sets


def vectors_of(
    model: HookedModel,
    vectors: Vector | Sequence[Vector] | None,
    rows: int,
    rule: Rule,
    positions: Positions,
) -> Sequence[Vector | None]:
    if not rule.needs_vectors:
        return [None] * rows
    if vectors is None:
        such = "head_vectors(model, users, heads)[user]" if rule.has("heads_shifted") else "style_vector(model, user)"
        raise SteeringError(f"generate: this rule needs vectors=, such as {such}")
    if positions != "response":
        raise SteeringError("generate: vectors are added from the last prompt token on; use positions='response'")
    if isinstance(vectors, Mapping):
        raise SteeringError("generate: these are vectors by user; give one a prompt, vectors[user.id]")
    each = [vectors] * rows if isinstance(vectors, Vector) else list(vectors)
    if len(each) != rows:
        raise SteeringError(f"generate: {rows} prompts and {len(each)} vectors; give one for each prompt")
    for vector in each:
        check_vector("generate", model, vector, rule)
    return each


def check_vector(call: str, model: HookedModel, vector: object, rule: Rule) -> None:
    """Refuse a vector that the rule does not add, or that is not of this model.

    Raises:
        SteeringError: names the call, and the rule that adds it.
    """
    kind, other = (HeadVector, "vector") if rule.has("heads_shifted") else (SteeringVector, "head_vector")
    if not isinstance(vector, kind):
        such = f"; rule {other!r} adds it" if isinstance(vector, Vector) else ""
        raise SteeringError(f"{call}: rule {rule.name!r} adds a {kind.__name__}, found a {type(vector).__name__}{such}")
    vector.check(call, model)


def negatives_of(
    negative_prompts: Prompts | None, batch: Sequence[Prompt | str], rule: Rule, ablation: Ablation
) -> Sequence[Prompt | str]:
    if not (rule.has("negative") or isinstance(ablation, Patch)):
        return batch
    if negative_prompts is None:
        raise SteeringError(
            "generate: this rule needs negative_prompts=, each prompt without its profile (profile='none')"
        )
    others = prompt_list(negative_prompts)
    if len(others) != len(batch):
        raise SteeringError(
            f"generate: {len(batch)} prompts and {len(others)} negative_prompts; give one for each prompt"
        )
    return others


def layers_to_contrast(model: HookedModel, layers: Sequence[int] | None = None) -> list[int]:
    """Layers that DoLa chooses from: as asked for, or the even ones of the lower half.

    Raises:
        SteeringError: a layer is not between the first and the last.
    """
    n_layers = model.cfg.n_layers
    if layers is None:
        return list(range(2, n_layers // 2 + 1, 2)) or [max(1, n_layers // 2)]
    if not layers or not all(isinstance(layer, int) and 0 < layer < n_layers for layer in layers):
        raise SteeringError(f"generate: early_layers {list(layers)} are not layers between 1 and {n_layers - 1}")
    return list(layers)


def prompt_list(prompts: Prompts) -> list[Prompt | str]:
    batch = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    if not batch:
        raise SteeringError("generate: no prompts were given")
    return batch


def names_of(heads: Heads) -> str:
    return str(heads) if isinstance(heads, HeadSet) else ",".join(f"{Head(*h)}:{w:g}" for h, w in heads.items())


def _profile(prompt: Prompt | str) -> tuple[int, int]:
    return prompt.spans["profile"] if isinstance(prompt, Prompt) else (0, 0)


def _ids(model: HookedModel, prompt: Prompt | str) -> Int[Tensor, " pos"]:
    if isinstance(prompt, Prompt):
        ids = prompt.prompt_tokens
    else:
        ids = torch.tensor(model.tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=torch.long)
        bos = start_token(model.tokenizer)
        # A chat template opens with its own marker, which for some models is the BOS token.
        if bos is not None and ids[:1].tolist() != [bos]:
            ids = torch.cat([torch.tensor([bos]), ids])
    if len(ids) < 2:
        raise SteeringError("generate: a prompt needs at least two tokens, the start token included")
    return ids


def per_row(name: str, value: object, rows: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) else [value] * rows
    if len(values) != rows:
        raise SteeringError(f"generate: {len(values)} values of {name} for {rows} prompts")
    return values


def samplings_of(sampling: Sampling | Sequence[Sampling | None] | None, rows: int) -> list[Sampling | None]:
    samplings = per_row("sampling", sampling, rows)
    for one in samplings:
        if not (one is None or isinstance(one, Sampling)):
            raise SteeringError(f"generate: sampling {one!r} is no Sampling(…), nor None for greedy decoding")
    return samplings
