"""Heads whose weights raise, or suppress, the token that they look at."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.errors import ModelCheckError, ScoreError
from dps_lens.families.work import FamilyWork
from dps_lens.model import HookedModel, Hooks, runner_of
from dps_lens.model.final_norm import without_bias
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.work import Engine

CopyingKind: TypeAlias = Literal["copying", "copy_suppression"]
_PART = 64


@dataclass(frozen=True)
class Copying:
    """How often a head that looks at a token moves this token's own logit to one end of the vocabulary.

    `copy_suppression`: the share of tokens whose own logit is among the `reach` that the head lowers most; `copying`:
    among those that it raises most (McDougall et al. 2023, arXiv 2310.04625; L10H7 of GPT-2 small suppresses 85% of
    tokens at a reach of 10). The logits are those of `embedding · W_V W_O` through the norms around it and the
    unembedding, where the embedding of a token is what the first layer leaves of the token alone. By chance
    `reach / d_vocab`.

    Attributes:
        name: the kind.
        n_tokens: random tokens of the vocabulary, or all where it holds no more.
        reach: how near to the end counts.
        seed: of the tokens.
    """

    unit: ClassVar[str] = "share of tokens"
    kinds: ClassVar[tuple[CopyingKind, ...]] = ("copying", "copy_suppression")

    name: CopyingKind = "copy_suppression"
    n_tokens: int = 256
    reach: int = 10
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What decides the scores, for a manifest."""
        return {"n_tokens": self.n_tokens, "reach": self.reach, "seed": self.seed}

    def score(
        self,
        model: HookedModel,
        *,
        folder: RunFolder | None = None,
        engine: Engine | None = None,
        progress: bool = True,
    ) -> HeadScores:
        """Scores `[token layer head]`, 0 or 1, so that intervals are over tokens.

        Raises:
            ScoreError: no token, or a reach beyond the vocabulary.
        """
        size = model.cfg.d_vocab
        if self.n_tokens < 1 or not 1 <= self.reach < size:
            raise ScoreError(
                f"{self.name}: n_tokens {self.n_tokens} and reach {self.reach} do not fit a vocabulary of {size}"
            )
        work = FamilyWork(model, self)
        parts = [str(part) for part in range(-(-min(self.n_tokens, size) // _PART))]
        found = work.run(parts, folder=folder, engine=engine, what=self.name, unit="part", progress=progress)
        tokens = drawn(model, self.n_tokens, self.seed).split(_PART)
        ids = [f"token {token}" for part in found for token in tokens[int(part)].tolist()]
        values = torch.cat([unit["score"] for unit in found.values()])
        return HeadScores(values, example_ids=ids, user_ids=ids, manifest=work.left_out)

    def measure(self, model: HookedModel, key: str, given: object = None) -> dict[str, Tensor]:
        """Scores of one part of the tokens."""
        ranks = own_ranks(model, drawn(model, self.n_tokens, self.seed).split(_PART)[int(key)])
        places = ranks.above if self.name == "copying" else ranks.below
        return {"score": (places < self.reach).float().permute(2, 0, 1)}


@dataclass(frozen=True, eq=False)
class Ranks:
    """How many other tokens of the vocabulary a head raises at least as much as the one that it looks at, and how many
    at most as much; a head that writes nothing ranks its token last on both sides."""

    above: Int[Tensor, "layer head token"]
    below: Int[Tensor, "layer head token"]


def drawn(model: HookedModel, n: int, seed: int) -> Int[Tensor, " token"]:
    """Random tokens of the vocabulary, none twice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(model.cfg.d_vocab, generator=generator)[:n]


@torch.inference_mode()
def own_ranks(model: HookedModel, tokens: Int[Tensor, " token"]) -> Ranks:
    """Where the logit of a token stands among all, when heads look at nothing but this token.

    Raises:
        ModelCheckError: the architecture has no norm before attention, or no residual stream behind the first layer.
    """
    runner, cfg = runner_of(model), model.cfg
    if "blocks.0.hook_resid_post" not in model.hook_dict:
        raise ModelCheckError("copying: this architecture shows no residual stream behind its first layer")
    tokens = tokens.to(runner.device)
    kept: list[Tensor] = []

    def keep(residual: Tensor, hook: object) -> None:
        kept.append(residual[:, 0].detach().clone())

    with Hooks(model, [("blocks.0.hook_resid_post", keep)]):
        runner.logits(tokens[:, None], keep=1)
    shape = (cfg.n_layers, cfg.n_heads, len(tokens))
    above, below = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    w_u = model.W_U.detach().float()
    for layer, block in enumerate(model.blocks):
        if not hasattr(block, "ln1"):
            raise ModelCheckError(f"copying: layer {layer} of this architecture has no norm before its attention")
        read = block.ln1(kept[0][:, None])[:, 0].float()
        w_v, w_o = block.attn.W_V.detach().float(), block.attn.W_O.detach().float()
        shared = cfg.n_heads // len(w_v)
        for head in range(cfg.n_heads):
            write = read @ w_v[head // shared] @ w_o[head]
            if hasattr(block, "ln1_post"):
                write = block.ln1_post(write[:, None].to(kept[0]))[:, 0].float()
            logits = without_bias(model, write) @ w_u
            own = logits.gather(1, tokens[:, None])
            above[layer, head] = (logits >= own).sum(1).cpu() - 1
            below[layer, head] = (logits <= own).sum(1).cpu() - 1
    return Ranks(above, below)
