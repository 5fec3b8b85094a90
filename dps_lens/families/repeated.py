"""Heads that are found by where they look in repeated random tokens: induction, previous and duplicate token."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dps_lens.data.tokenizer import start_token
from dps_lens.errors import ScoreError
from dps_lens.families.work import FamilyWork
from dps_lens.model import HookedModel, check_attention_reads
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.work import Engine

RepeatedKind: TypeAlias = Literal["induction", "previous_token", "duplicate_token"]


@dataclass(frozen=True)
class Repeated:
    """Attention to a set place, on `[BOS, r1 … rN, r1 … rN]` (Olsson et al. 2022, arXiv 2209.11895).

    `induction`: from a repeated token to the token after its first occurrence. `duplicate_token`: from a
    repeated token to its first occurrence. `previous_token`: from any token to the one before. The
    score is the mean attention over the tokens that have such a place, 0 to 1.

    Attributes:
        name: the kind.
        n_prompts: random prompts.
        length: N, distinct random tokens.
        seed: of the tokens.
    """

    unit: ClassVar[str] = "mean attention"
    kinds: ClassVar[tuple[RepeatedKind, ...]] = ("induction", "previous_token", "duplicate_token")

    name: RepeatedKind = "induction"
    n_prompts: int = 20
    length: int = 50
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What decides the scores, for a manifest."""
        return {"n_prompts": self.n_prompts, "length": self.length, "seed": self.seed}

    def measure(self, model: HookedModel, key: str, given: object = None) -> dict[str, Tensor]:
        """Scores in the prompt of one seed."""
        tokens = repeated_tokens(model, self.length, int(key))
        return {"score": attention_to(model, tokens, _target(self.name, tokens))}

    def score(
        self,
        model: HookedModel,
        *,
        folder: RunFolder | None = None,
        engine: Engine | None = None,
        progress: bool = True,
    ) -> HeadScores:
        """Scores `[prompt layer head]`.

        Raises:
            ScoreError: the prompt does not fit the model's context, or the vocabulary is too small.
        """
        if 2 * self.length + 1 > model.cfg.n_ctx:
            raise ScoreError(f"{self.name}: {2 * self.length + 1} tokens do not fit the context of {model.cfg.n_ctx}")
        work = FamilyWork(model, self)
        seeds = [str(self.seed + index) for index in range(self.n_prompts)]
        found = work.run(seeds, folder=folder, engine=engine, what=self.name, unit="prompt", progress=progress)
        ids = [f"seed {seed}" for seed in found]
        values = torch.stack([unit["score"] for unit in found.values()])
        return HeadScores(values, example_ids=ids, user_ids=ids, manifest=work.left_out)


def repeated_tokens(model: HookedModel, length: int, seed: int) -> Int[Tensor, "1 pos"]:
    """`[BOS, r1 … rN, r1 … rN]` of distinct ordinary tokens; without BOS where the tokenizer has none.

    Raises:
        ScoreError: the vocabulary is too small.
    """
    # Reserved tokens, of which some tokenizers have hundreds, are not among `all_special_ids`.
    reserved = {token for token, added in model.tokenizer.added_tokens_decoder.items() if added.special}
    special = reserved | set(model.tokenizer.all_special_ids)
    usable = torch.tensor([token for token in range(len(model.tokenizer)) if token not in special])
    if len(usable) < length:
        raise ScoreError(f"repeated_tokens: {length} distinct tokens asked for, the tokenizer has {len(usable)}")
    generator = torch.Generator().manual_seed(seed)
    drawn = usable[torch.randperm(len(usable), generator=generator)[:length]]
    bos = start_token(model.tokenizer)
    start = torch.tensor([bos] if bos is not None else [], dtype=torch.long)
    return torch.cat([start, drawn, drawn])[None]


@torch.inference_mode()
def attention_to(
    model: HookedModel, tokens: Int[Tensor, "1 pos"], target: Float[Tensor, "query key"]
) -> Float[Tensor, "layer head"]:
    """Mean attention to the marked keys, over the queries that have one.

    Args:
        model: a hooked model; its hooked attention runs.
        tokens: one prompt.
        target: 1 where attention counts, as the detection patterns of transformer-lens.

    Raises:
        ScoreError: no query has a marked key.
    """
    check_attention_reads("attention_to", model)
    queries = int(target.any(-1).sum())
    if not queries:
        raise ScoreError("attention_to: the target marks no key")
    found = torch.zeros(model.cfg.n_layers, model.cfg.n_heads)

    def add(pattern: Tensor, hook: object, layer: int) -> None:
        found[layer] = (pattern[0].float().cpu() * target).sum((-1, -2)) / queries

    hooks = [(f"blocks.{layer}.attn.hook_pattern", partial(add, layer=layer)) for layer in range(model.cfg.n_layers)]
    device = next(model.parameters()).device
    model.run_with_hooks(tokens.to(device), fwd_hooks=hooks, return_type="logits")
    return found


def _target(kind: RepeatedKind, tokens: Int[Tensor, "1 pos"]) -> Float[Tensor, "query key"]:
    from transformer_lens import head_detector

    make = getattr(head_detector, f"get_{kind}_head_detection_pattern")
    return make(tokens).float()
