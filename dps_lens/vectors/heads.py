"""Make head vectors: record z below own and counterfactual profiles, and take the difference by a recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.data import Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.conditions import DONORS, prompts_in
from dps_lens.data.examples import by_key, choosing_examples, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.errors import SteeringError
from dps_lens.found import FoundHeads
from dps_lens.heads import HeadSet
from dps_lens.intervene import response_z
from dps_lens.literals import RECIPES, VECTOR_AGAINST, Recipe, VectorAgainst
from dps_lens.model import HookedModel
from dps_lens.vectors.result import HeadVectors
from dps_lens.vectors.style import generic_answers
from dps_lens.work import Engine, Run, RunConfig, Work


def head_vectors(
    model: HookedModel,
    users: Sequence[User],
    heads: HeadSet | FoundHeads,
    *,
    against: VectorAgainst = "other_user",
    recipe: Recipe = "difference",
    max_examples: int | None = 4,
    n_donors: int = DONORS,
    generic: Mapping[str, str] | None = None,
    prompt_config: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> HeadVectors:
    """What each user's own texts add to the z of heads, beyond a counterfactual: one vector a user, a row a head.

    δ_h is the mean of head h's z over the response positions of the user's discovery examples, own profile shown, minus
    the same of the counterfactual run. Examples weigh the same, and positions within one.

    `recipe="difference"` adds δ_h: the difference of means, in the form of function vectors (arXiv 2310.15213) and of
    the mass means of ITI. `"probe"` adds σ_h θ_h, as ITI does (arXiv 2306.03341): θ_h is the unit normal of a logistic
    regression that tells own z from counterfactual z, and σ_h the standard deviation of z along it. `"persona"` adds
    what of δ_h points to the whole layer's difference, after Style Modulation Heads (arXiv 2603.13249), in a form of
    ours: the z whose output is nearest to the projection of `δ_h W_O[h]` on the unit difference of the attention
    output of all heads.

    Args:
        model: a hooked model.
        users: whose discovery examples are read, never the evaluation examples.
        heads: the heads, such as `find_heads(…)`. Of found heads, the set of all users.
        against: the counterfactual: `"other_user"` (the same text below other users' profiles), `"no_profile"` (the
            same text without one), or `"generic"` (no profile on either side: the own text minus a generic answer, as
            in StyleVector, arXiv 2503.05213).
        recipe: see above.
        max_examples: the newest so many discovery examples.
        n_donors: other users, for `"other_user"`.
        generic: for `"generic"`, answers by the id of the discovery example, instead of the model's own.
        prompt_config: how prompts are built.
        seed: of donors.
        out: a run folder; a run that is started again there resumes.
        engine: as in `score_heads`.
        run_config: force, progress bars.

    Raises:
        SteeringError: the settings do not fit together, or an answer is missing in `generic`.
        ScoreError: no user has a discovery example.
        HeadError: a head lies outside the model.
        RunError: `out` holds a run with other settings.
    """
    run = Run(model, HeadVectors, out, engine, run_config)
    work = VectorWork(
        model,
        list(users),
        heads.heads if isinstance(heads, FoundHeads) else heads,
        against=against,
        recipe=recipe,
        max_examples=max_examples,
        n_donors=n_donors,
        generic=generic,
        prompt_config=prompt_config or PromptConfig(),
        seed=seed,
    )
    run.open(work.fingerprint)
    return run.keep(work.run(run))


@dataclass
class VectorWork(Work):
    """The run of `head_vectors`, an example a unit."""

    model: HookedModel
    users: Sequence[User]
    heads: HeadSet
    against: VectorAgainst = "other_user"
    recipe: Recipe = "difference"
    max_examples: int | None = None
    n_donors: int = DONORS
    generic: Mapping[str, str] | None = None
    prompt_config: PromptConfig = field(default_factory=PromptConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        call, cfg = "head_vectors", self.model.cfg
        if self.against not in VECTOR_AGAINST:
            raise SteeringError(f"{call}: against {self.against!r} is unknown; use one of {', '.join(VECTOR_AGAINST)}")
        if self.recipe not in RECIPES:
            raise SteeringError(f"{call}: recipe {self.recipe!r} is unknown; use one of {', '.join(RECIPES)}")
        if self.against == "other_user" and len(self.users) < 2:
            raise SteeringError(f"{call}: against='other_user' needs at least two users; use 'no_profile' or 'generic'")
        if self.generic is not None and self.against != "generic":
            raise SteeringError(f"{call}: generic= holds answers for against='generic'")
        if not len(self.heads):
            raise SteeringError(f"{call}: give at least one head")
        check_whole(SteeringError, f"{call}: n_donors", self.n_donors, least=1)
        self.heads.mask(cfg)
        self.heads = HeadSet(self.heads, self.heads.label, (cfg.n_layers, cfg.n_heads))

    @cached_property
    def examples(self) -> list[Example]:
        """Discovery examples, user by user."""
        return choosing_examples("head_vectors", self.users, "history", self.max_examples)

    @cached_property
    def by_key(self) -> dict[str, Example]:
        return by_key(self.examples)

    def owner(self, key: str) -> str:
        return self.by_key[key].user_id

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        return {
            "call": "head_vectors",
            "heads": str(self.heads),
            "against": self.against,
            "recipe": self.recipe,
            "max_examples": self.max_examples,
            "n_donors": self.n_donors,
            "generic": dict(self.generic) if self.generic is not None else None,
            "seed": self.seed,
            **describe_inputs(self.model, self.users, self.examples, self.prompt_config),
            "examples": [unit_key(example) for example in self.examples],
        }

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """z of the heads at the response positions, `own` `[pos head d_head]` and `other`; for `persona`, also what all
        heads of the layers differ by, `layers` `[layer head d_head]`."""
        return self.z_of(self.by_key[key])

    def z_of(self, example: Example) -> dict[str, Tensor]:
        """What `make` gives, of any example."""
        own, others = self._prompts(example)
        if any(not len(prompt.response_tokens) for prompt in others):
            whose = "the model's own" if self.generic is None else "the given"
            raise SteeringError(
                f"head_vectors: {whose} answer to example {example.id!r} is empty; give another in generic="
            )
        z, other = response_z(self.model, own), torch.cat([response_z(self.model, prompt) for prompt in others], dim=1)
        made = {"own": self._of_heads(z), "other": self._of_heads(other)}
        if self.recipe == "persona":
            made["layers"] = z.mean(1) - other.mean(1)
        return made

    def _prompts(self, example: Example) -> tuple[Prompt, list[Prompt]]:
        if self.against == "generic":
            own = build_prompt(self.model, example, "none", config=self.prompt_config)
            (other,) = generic_answers(
                "head_vectors", self.model, [example], generic=self.generic, config=self.prompt_config
            )
            return own, [other]
        own = build_prompt(self.model, example, config=self.prompt_config)
        return own, prompts_in(
            self.model,
            example,
            self.against,
            self.users,
            n_donors=self.n_donors,
            seed=self.seed,
            config=self.prompt_config,
        )

    def _of_heads(self, z: Float[Tensor, "layer pos head d_head"]) -> Float[Tensor, "pos chosen d_head"]:
        return torch.stack([z[layer, :, head] for layer, head in self.heads], dim=1)

    def run(self, run: Run) -> HeadVectors:
        """Record every example; finished ones are read from the run's folder."""
        made = run.units(self, list(self.by_key), "z of heads").made
        examples = [self.by_key[key] for key in made]
        owners = [example.user_id for example in examples]
        users = tuple(dict.fromkeys(owners))
        units = list(made.values())
        differences = torch.stack([difference(unit) for unit in units])
        values = []
        for user in users:
            own = [unit for unit, owner in zip(units, owners, strict=True) if owner == user]
            mean = torch.stack([difference(unit) for unit in own]).mean(0)
            if self.recipe == "probe":
                values.append(probed(torch.cat([one["own"] for one in own]), torch.cat([one["other"] for one in own])))
            elif self.recipe == "persona":
                values.append(self._persona(mean, torch.stack([one["layers"] for one in own]).mean(0)))
            else:
                values.append(mean)
        return HeadVectors(
            self.heads,
            users,
            torch.stack(values),
            differences,
            tuple(owners),
            tuple(example.id for example in examples),
            manifest=run.manifest,
        )

    def _persona(
        self, mean: Float[Tensor, "chosen d_head"], layers: Float[Tensor, "layer head d_head"]
    ) -> Float[Tensor, "chosen d_head"]:
        rows = []
        for (layer, head), delta in zip(self.heads, mean, strict=True):
            # In float64: the last digits of a least-squares solution depend on where its numbers lie in memory.
            w_o = self.model.blocks[layer].attn.W_O.detach().double().cpu()
            persona = torch.einsum("hd,hde->e", layers[layer].double(), w_o)
            persona = persona / persona.norm().clamp(min=1e-12)
            wanted = (delta.double() @ w_o[head] @ persona) * persona
            rows.append(torch.linalg.lstsq(w_o[head].T, wanted[:, None]).solution[:, 0].float())
        return torch.stack(rows)


def difference(unit: Mapping[str, Tensor]) -> Float[Tensor, "chosen d_head"]:
    """The difference of means of what `VectorWork.make` gives of one example."""
    return unit["own"].mean(0) - unit["other"].mean(0)


class HeadDifferences:
    """Differences of means at every head of the model, example by example; arguments as of `head_vectors`."""

    def __init__(
        self,
        model: HookedModel,
        users: Sequence[User],
        *,
        against: VectorAgainst,
        prompt_config: PromptConfig,
        seed: int = 0,
    ) -> None:
        self._size = model.cfg.n_layers, model.cfg.n_heads
        heads = HeadSet((layer, head) for layer in range(self._size[0]) for head in range(self._size[1]))
        self._work = VectorWork(model, users, heads, against=against, prompt_config=prompt_config, seed=seed)

    def of(self, example: Example) -> Float[Tensor, "layer head d_head"]:
        """The own text's mean z minus the counterfactual's."""
        return difference(self._work.z_of(example)).unflatten(0, self._size)


def probed(
    own: Float[Tensor, "own head d_head"], other: Float[Tensor, "other head d_head"]
) -> Float[Tensor, "head d_head"]:
    """σ θ of each head: the normal of a logistic regression between the two, as long as z spreads along it."""
    from sklearn.linear_model import LogisticRegression

    labels = np.repeat([1, 0], [len(own), len(other)])
    rows = []
    for z in torch.cat([own, other]).double().unbind(1):
        probe = LogisticRegression(class_weight="balanced", max_iter=1000).fit(z.numpy(), labels)
        theta = torch.from_numpy(probe.coef_[0])
        theta = theta / theta.norm().clamp(min=1e-12)
        rows.append((z @ theta).std() * theta)
    return torch.stack(rows).float()
