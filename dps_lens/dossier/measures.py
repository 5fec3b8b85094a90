"""What heads of one layer look at and write in one example."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.data.copied import copied_tokens
from dps_lens.dossier.words import KINDS, WordKinds
from dps_lens.heads import Head
from dps_lens.model import HookedModel
from dps_lens.model.final_norm import FinalNorm
from dps_lens.validation.attention import targets_of

NGRAM = 2
READS = (
    "profile",
    "largest document",
    "texts of documents",
    "titles and labels",
    "task",
    "response",
    "first token",
    "rest of the prompt",
    "same token",
    "token after the same token",
    "token that is written",
    "delimiters",
)
ELSEWHERE = ("profile, beyond a null response", "another user's profile", "profile, words shuffled")
WRITES = ("own text", "what it looks at", "directly", "patched")
TOKENS = ("copied tokens", "other tokens", *KINDS)
SECTIONS = {"reads": READS, "reads, otherwise": ELSEWHERE, "writes": WRITES, "per token": TOKENS}
"""Section → measures, in the order of a dossier's rows."""

MEASURES = tuple(name for names in SECTIONS.values() for name in names)


@dataclass(frozen=True, eq=False)
class Look:
    """Where heads of one layer attend in one prompt.

    Attributes:
        prompt: what is read.
        pattern: from the positions whose logits give the response.
    """

    prompt: Prompt
    pattern: Float[Tensor, "head query key"]

    @classmethod
    def of(cls, prompt: Prompt, pattern: Float[Tensor, "every_head query key"], heads: Sequence[Head]) -> "Look":
        """Of some heads of a layer's pattern."""
        return cls(prompt, pattern[[head.head for head in heads]].cpu())

    def share(self, keys: Bool[Tensor, "*query key"]) -> Float[Tensor, " head"]:
        """Attention to marked positions, mean over queries."""
        return (self.pattern * keys).sum(-1).mean(-1)

    @property
    def profile(self) -> Float[Tensor, " head"]:
        return self._within(*self.prompt.spans["profile"])

    def _within(self, start: int, stop: int) -> Float[Tensor, " head"]:
        return self.pattern[..., start:stop].sum(-1).mean(-1)

    def reads(self, model: HookedModel) -> dict[str, Float[Tensor, " head"]]:
        """Attention by place, and by what stands there."""
        n_keys = self.pattern.shape[-1]
        tokens = self.prompt.tokens
        keys, targets = tokens[:n_keys], targets_of(self.prompt)
        places = {name: self.share(where[:n_keys]) for name, (_, where) in targets.items()}
        documents = [share for name, share in places.items() if name.startswith("item ")]
        begin = self.prompt.spans["response"][0] - 1
        asking, written = tokens[begin:n_keys, None], tokens[begin + 1 : n_keys + 1, None]
        earlier = torch.arange(n_keys) < torch.arange(begin, n_keys)[:, None]
        before = torch.cat([keys.new_full((1,), -1), keys[:-1]])
        pieces = [model.tokenizer.decode([token]) for token in keys.tolist()]
        marks = torch.tensor([not any(letter.isalnum() or letter == "\ufffd" for letter in piece) for piece in pieces])
        marks[0] = False
        nothing = torch.zeros(len(self.pattern))
        texts = sum((self._within(*body) for body in self.prompt.bodies), nothing)
        return {
            "profile": self.profile,
            "largest document": torch.stack(documents).amax(0) if documents else nothing,
            "texts of documents": texts,
            "titles and labels": sum(documents, nothing) - texts,
            "task": places["task"],
            "response": places["response"],
            "first token": places["first token"],
            "rest of the prompt": places["other"],
            "same token": self.share((keys == asking) & earlier),
            "token after the same token": self.share((before == asking) & (torch.arange(n_keys) > 0)),
            "token that is written": self.share(keys == written),
            "delimiters": self.share(marks),
        }


def looked_at(
    look: Look, write: Float[Tensor, "head pos d_model"], norm: FinalNorm, w_u: Float[Tensor, "d_model vocab"]
) -> Float[Tensor, " head"]:
    """How much heads raise the logits of the tokens that they attend to, above the mean logit, mean over queries."""
    keys = look.prompt.tokens[: look.pattern.shape[-1]]
    logits = norm(write) @ w_u
    above = logits[..., keys.to(logits.device)] - logits.mean(-1, keepdim=True)
    return (look.pattern * above.cpu()).sum(-1).mean(-1)


def attributed(
    write: Float[Tensor, "head pos d_model"],
    norm: FinalNorm,
    w_u: Float[Tensor, "d_model vocab"],
    targets: Int[Tensor, " pos"],
) -> Float[Tensor, "head pos"]:
    """Direct logit attribution to the logits of the response's own tokens, above the mean logit."""
    direction = (w_u[:, targets] - w_u.mean(1, keepdim=True)).T
    return (norm(write) * direction).sum(-1)


def per_token(
    change: Float64[Tensor, "head pos"], prompt: Prompt, pieces: Sequence[str], kinds: WordKinds
) -> dict[str, Float64[Tensor, " head"]]:
    """What the tokens of each kind have of the mean change, which they add up to."""
    start, stop = prompt.spans["profile"]
    copied = copied_tokens(prompt.response_tokens.tolist(), prompt.tokens[start:stop].tolist(), NGRAM)
    of_token = kinds.of_tokens(prompt.user_id, pieces)
    found = {
        "copied tokens": (change * copied).mean(-1),
        "other tokens": (change * (1 - copied)).mean(-1),
    }
    for kind in KINDS:
        mask = torch.tensor([one == kind for one in of_token])
        found[kind] = (change * mask).mean(-1)
    return found


def stacked(found: Mapping[str, Tensor]) -> Float64[Tensor, "head measure"]:
    """Measures in the order of `MEASURES`."""
    return torch.stack([found[name].double().cpu() for name in MEASURES], dim=1)
