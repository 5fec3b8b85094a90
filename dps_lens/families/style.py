"""Style-modulation heads: which heads of a layer write what the user's profile changes in its attention output."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.data import Example, PromptConfig, User, build_prompt
from dps_lens.data.conditions import DONORS, prompts_in
from dps_lens.data.examples import by_key, choosing_examples, data_digest
from dps_lens.errors import ScoreError
from dps_lens.families.work import FamilyWork
from dps_lens.intervene import response_z
from dps_lens.literals import AGAINST, Against
from dps_lens.model import HookedModel, has_weights
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.work import Engine

_OWN, _NULL = "the user's style", "signs at random"
_DRAWS = 64


@dataclass(frozen=True, eq=False)
class StyleModulation:
    """Style Modulation Heads (Izawa et al. 2026, arXiv 2603.13249), the persona being the user.

    δ is the mean z of a head over the response positions below the own profile, minus that below another one, mean over
    the user's examples. A head contributes `⟨δ_h W_O[h], Σ δ W_O⟩` to what its layer's attention writes. As in the
    authors' code, `sign(s) · log(1 + |s|)` is standardised over the heads of a layer: a head well above 0 writes the
    style, one well below 0 writes against it. They compare answers of the model below a persona and its opposite; here
    it is the user's own text, below two profiles. They then keep to the heads of the one layer in which the persona
    forms, and found three there.

    The component `"signs at random"` is the null: the same, with the sign of each example's difference drawn at random,
    mean over 64 draws; NaN for a user with one example, whose sign changes nothing.

    Attributes:
        users: whose newest discovery examples are read; a row each.
        against: the other profile: of other users, or none.
        max_examples: the newest so many discovery examples of each user.
        n_donors: other users, for `"other_user"`.
        prompt_config: how prompts are built.
        seed: of donors and of the null.
    """

    name: ClassVar[Literal["style_modulation"]] = "style_modulation"
    unit: ClassVar[str] = "standard deviations within the layer"

    users: Sequence[User]
    against: Against = "other_user"
    max_examples: int = 4
    n_donors: int = DONORS
    prompt_config: PromptConfig = field(default_factory=PromptConfig)
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What decides the scores, for a manifest."""
        return {
            "data": data_digest(self.users, self.examples),
            "against": self.against,
            "max_examples": self.max_examples,
            "n_donors": self.n_donors,
            "prompt_config": self.prompt_config.to_dict(),
            "seed": self.seed,
        }

    def score(
        self,
        model: HookedModel,
        *,
        folder: RunFolder | None = None,
        engine: Engine | None = None,
        progress: bool = True,
    ) -> HeadScores:
        """Scores `[user layer head]`.

        Raises:
            ScoreError: the other profile is unknown or nobody's, or the model was loaded without weights.
        """
        if self.against not in AGAINST:
            raise ScoreError(f"{self.name}: against {self.against!r} is unknown; use one of {', '.join(AGAINST)}")
        if self.against == "other_user" and len(self.users) < 2:
            raise ScoreError(f"{self.name}: against='other_user' needs at least two users; use 'no_profile'")
        if not has_weights(model):
            raise ScoreError(f"{self.name}: W_O is read here, and this model was loaded without weights")
        check_whole(ScoreError, f"{self.name}: n_donors", self.n_donors, least=1)
        work, examples = FamilyWork(model, self), by_key(self.examples)
        found = work.run(
            list(examples), folder=folder, engine=engine, what=self.name, unit="example", progress=progress
        )
        of_user: dict[str, list[Tensor]] = {}
        for key, unit in found.items():
            of_user.setdefault(examples[key].user_id, []).append(unit["z"])
        generator = torch.Generator().manual_seed(self.seed)
        parts: dict[str, list[Tensor]] = {_OWN: [], _NULL: []}
        for rows in of_user.values():
            z = torch.stack(rows)
            parts[_OWN].append(contributions(model, z.mean(0)))
            signs = torch.randint(2, (_DRAWS, len(z)), generator=generator) * 2.0 - 1
            drawn = [contributions(model, torch.einsum("e,elhd->lhd", sign, z) / len(z)) for sign in signs]
            parts[_NULL].append(
                torch.stack(drawn).mean(0) if len(z) > 1 else torch.full_like(parts[_OWN][-1], torch.nan)
            )
        components = {name: torch.stack(values) for name, values in parts.items()}
        return HeadScores(
            components[_OWN],
            example_ids=list(of_user),
            user_ids=list(of_user),
            components=components,
            manifest=work.left_out,
        )

    def measure(self, model: HookedModel, key: str, given: object = None) -> dict[str, Tensor]:
        """`z` `[layer head d_head]` of one example: below the own profile, minus below the others."""
        example, config = by_key(self.examples)[key], self.prompt_config
        others = prompts_in(
            model, example, self.against, self.users, n_donors=self.n_donors, seed=self.seed, config=config
        )
        own, *rest = [response_z(model, prompt) for prompt in (build_prompt(model, example, config=config), *others)]
        return {"z": own.mean(1) - torch.cat(rest, dim=1).mean(1)}

    @cached_property
    def examples(self) -> list[Example]:
        """The discovery examples that are read, user by user."""
        return choosing_examples(self.name, self.users, "history", self.max_examples)


def contributions(model: HookedModel, z: Float[Tensor, "layer head d_head"]) -> Float[Tensor, "layer head"]:
    """What each head writes of its layer's whole write, in logs, standardised over the layer's heads."""
    rows = []
    for layer, of_layer in enumerate(z):
        w_o = model.blocks[layer].attn.W_O.detach().float().cpu()
        written = torch.einsum("hd,hde->he", of_layer.cpu(), w_o)
        inner = written @ written.sum(0)
        logs = inner.sign() * inner.abs().log1p()
        rows.append((logs - logs.mean()) / logs.std(correction=0).clamp(min=1e-12))
    return torch.stack(rows)
