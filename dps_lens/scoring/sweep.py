"""What `score_heads` runs for one example, and how the results are put together."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dps_lens.data import Discovery, Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.errors import PromptError, ScoreError
from dps_lens.intervene import ABLATIONS, POSITIONS, Ablation, Positions, Where, record_z
from dps_lens.model import HookedModel, Runner, describe_model
from dps_lens.runs import Engine, Units, Work, make_units
from dps_lens.scores import HeadScores
from dps_lens.scoring.attribution import attribute
from dps_lens.scoring.branches import BatchSize, Branches, single_heads

Contrast: TypeAlias = Literal["no_profile", "other_user"]
Direction: TypeAlias = Literal["noising", "denoising"]
Method: TypeAlias = Literal["exact", "attribution", "screened"]

SIGN = "positive: ablating the head raises the NLL of the user's own text"


@dataclass(frozen=True)
class Term:
    """One prompt whose heads are ablated, and its part in the score of an example.

    Attributes:
        component: which component of the score it belongs to.
        nll_name: the condition whose clean NLL it gives.
        weight: of its component in the score, divided by the number of prompts of that component.
        sign: −1 where the ablation helps (denoising) and the recovered log-probability is scored.
    """

    component: str
    nll_name: str
    weight: float
    sign: int
    branches: Branches
    values: Tensor | None = None
    where: Where | None = None

    def exact(self, chosen: Bool[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
        """Measured effect of the chosen heads; 0 elsewhere."""
        rows = single_heads(*chosen.shape)[chosen.flatten()]
        effect = torch.zeros(chosen.shape)
        if len(rows):
            effect[chosen] = (self.branches.ablated(rows, self.values, self.where) - self.branches.nll).float()
        return self.sign * effect

    def estimate(self) -> Float[Tensor, "layer head"]:
        """First-order estimate of the effect of every head."""
        return self.sign * attribute(self.branches, self.values, self.where)


@dataclass(frozen=True)
class Sweep(Work):
    """One setting of `score_heads`: what is run for an example, and how results are put together.

    Attributes:
        means: for `mean`, `[layer head d_head]` over the edited positions of all examples, by component.
    """

    model: HookedModel
    users: list[User]
    method: Method
    exact_layers: int
    confirm: float
    contrast: Contrast | None
    ablation: Ablation
    positions: Positions
    discovery: Discovery
    max_examples: int | None
    prompt: PromptConfig
    patch_from: Contrast
    direction: Direction
    n_donors: int
    seed: int
    batch_size: BatchSize
    means: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("ablation", self.ablation, ABLATIONS),
            ("positions", self.positions, POSITIONS),
            ("contrast", self.contrast, ("no_profile", "other_user", None)),
            ("patch_from", self.patch_from, ("no_profile", "other_user")),
            ("direction", self.direction, ("noising", "denoising")),
            ("method", self.method, ("exact", "attribution", "screened")),
        ):
            if value not in known:
                raise ScoreError(f"score_heads: {name} {value!r} is unknown; use one of {known}")
        if self.exact_layers < 0 or not 0 <= self.confirm <= 1:
            raise ScoreError("score_heads: exact_layers is a number of layers, confirm a share between 0 and 1")
        if not self.users:
            raise ScoreError("score_heads: there are no users")
        if self.max_examples is not None and self.max_examples < 1:
            raise ScoreError(f"score_heads: max_examples {self.max_examples} leaves nothing to score")
        if self.ablation == "patch" and self.contrast is not None:
            raise ScoreError(
                "score_heads: 'patch' already compares two prompts, and a prompt patched from itself scores 0; "
                "use contrast=None"
            )
        needs_donors = self.contrast == "other_user" or (self.ablation == "patch" and self.patch_from == "other_user")
        if needs_donors and len(self.users) < 2:
            raise ScoreError("score_heads: 'other_user' needs at least two users")

    @cached_property
    def examples(self) -> list[Example]:
        found: list[Example] = []
        for user in self.users:
            own = user.discovery_examples(self.discovery)
            if not own:
                raise ScoreError(
                    f"score_heads: user {user.id!r} has no discovery example (a dated history needs more than 3 "
                    f"documents, this one has {len(user.discovery_pool)}); leave the user out"
                )
            found.extend(own[-self.max_examples :] if self.max_examples else own)
        return found

    @cached_property
    def by_key(self) -> dict[str, Example]:
        """Examples by the keys of their units."""
        return {f"{example.user_id}|{example.id}": example for example in self.examples}

    @cached_property
    def runner(self) -> Runner:
        return Runner.of(self.model)

    def make(self, key: str, given: Any = None) -> dict[str, Tensor]:
        return self.unit(self.by_key[key]) if key in self.by_key else self.sums(key)

    def owner(self, key: str) -> str:
        return self.by_key[key].user_id

    def donors(self, example: Example) -> list[User]:
        """Other users of the same task, the same for every run with this seed."""
        return donors_of(example, self.users, self.n_donors, self.seed)

    def conditions(self, example: Example) -> dict[str, list[Prompt]]:
        """The prompts whose heads are ablated, by component."""
        prompts = {"own": [self.build(example, "own")]}
        if self.contrast:
            prompts[self.contrast] = self.counterfactuals(example, self.contrast)
        responses = {tuple(prompt.response_tokens.tolist()) for group in prompts.values() for prompt in group}
        if len(responses) != 1:
            raise ScoreError(f"example {example.id!r}: the response differs between conditions")
        return prompts

    def counterfactuals(self, example: Example, kind: Contrast) -> list[Prompt]:
        if kind == "no_profile":
            return [self.build(example, "none")]
        return [self.build(example, donor) for donor in self.donors(example)]

    def build(self, example: Example, profile: Any) -> Prompt:
        return build_prompt(self.model, example, profile, config=self.prompt)

    def terms(self, example: Example) -> list[Term]:
        """The prompts of an example whose heads are ablated."""
        if self.ablation == "patch":
            return self.patch_terms(example)
        found = []
        for name, prompts in self.conditions(example).items():
            weight = (1.0 if name == "own" else -1.0) / len(prompts)
            found += [Term(name, name, weight, 1, self.branches(prompt), self.means.get(name)) for prompt in prompts]
        return found

    def patch_terms(self, example: Example) -> list[Term]:
        """Terms with z patched between the user's own prompt and counterfactual ones."""
        own, others = self.build(example, "own"), self.counterfactuals(example, self.patch_from)
        found = []
        for other in others:
            noising = self.direction == "noising"
            base, source = (own, other) if noising else (other, own)
            values, where = aligned_z(self.model, base, source, self.positions)
            nll_name = "own" if noising else self.patch_from
            # A denoising patch lowers the NLL; what it recovers is counted as positive.
            sign = 1 if noising else -1
            found.append(Term("own", nll_name, 1 / len(others), sign, self.branches(base), values, where))
        return found

    def branches(self, prompt: Prompt) -> Branches:
        return Branches(
            self.runner, prompt, ablation=self.ablation, positions=self.positions, batch_size=self.batch_size
        )

    def unit(self, example: Example) -> dict[str, Tensor]:
        """Components `[layer head]` and clean NLLs of one example; `exact` says which values are measured."""
        terms = self.terms(example)
        size = (self.model.cfg.n_layers, self.model.cfg.n_heads)
        chosen = torch.ones(size, dtype=torch.bool)
        effects = [torch.zeros(size) for _ in terms]
        if self.method != "exact":
            effects = [term.estimate() for term in terms]
            chosen = self.confirmed(sum(term.weight * effect for term, effect in zip(terms, effects, strict=True)))  # type: ignore[arg-type]
        effects = [torch.where(chosen, term.exact(chosen), effect) for term, effect in zip(terms, effects, strict=True)]
        found: dict[str, Tensor] = {"exact": chosen} if self.method != "exact" else {}
        for name in dict.fromkeys(term.component for term in terms):
            own = [effect for term, effect in zip(terms, effects, strict=True) if term.component == name]
            found[f"component.{name}"] = torch.stack(own).mean(0)
        for name in dict.fromkeys(term.nll_name for term in terms):
            nlls = [term.branches.nll for term in terms if term.nll_name == name]
            found[f"nll.{name}"] = torch.tensor(nlls, dtype=torch.float64).mean()
        return found

    def confirmed(self, estimate: Float[Tensor, "layer head"]) -> Bool[Tensor, "layer head"]:
        """Heads that are measured: the earliest layers, where gradients mislead, and the best estimates."""
        chosen = torch.zeros_like(estimate, dtype=torch.bool)
        if self.method == "attribution":
            return chosen
        chosen[: self.exact_layers] = True
        rest = estimate.masked_fill(chosen, -torch.inf).flatten()
        count = min(round(self.confirm * estimate.numel()), int((~chosen).sum()))
        chosen.view(-1)[rest.topk(count).indices] = True
        return chosen

    def with_means(self, engine: Engine | None, progress: bool) -> "Sweep":
        """For `mean`, the same sweep that knows the mean z of every head."""
        if self.ablation != "mean":
            return self
        users = list(dict.fromkeys(example.user_id for example in self.examples))
        made = make_units(self, users, engine=engine, what="mean of z", unit="user", split=False, progress=progress)
        found = made.made.values()
        means = {}
        for name in ("own", self.contrast):
            sums = [one[f"sum.{name}"] for one in found if f"sum.{name}" in one]
            if sums:
                count = sum(int(one[f"count.{name}"]) for one in found if f"count.{name}" in one)
                means[name] = (torch.stack(sums).sum(0) / count).float()
        # A prompt without profile has no profile positions; its edit is empty whatever the values are.
        nothing = torch.zeros_like(means["own"])
        return replace(self, means={name: means.get(name, nothing) for name in ("own", self.contrast) if name})

    def sums(self, user: str) -> dict[str, Tensor]:
        """Sums of z over the edited positions of a user's prompts: `sum.…` and `count.…` by component."""
        found: dict[str, Tensor] = {}
        for example in (one for one in self.examples if one.user_id == user):
            for name, prompts in self.conditions(example).items():
                for prompt in prompts:
                    start, stop = prompt.spans["profile"]
                    if self.positions == "profile" and stop <= start:
                        continue
                    z = record_z(self.model, prompt, positions=self.positions).double()
                    found[f"sum.{name}"] = found.get(f"sum.{name}", torch.zeros(())) + z.sum(1)
                    found[f"count.{name}"] = found.get(f"count.{name}", torch.tensor(0)) + z.shape[1]
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        settings = {
            name: getattr(self, name)
            for name in ("contrast", "ablation", "positions", "discovery", "max_examples", "seed")
        }
        if self.method == "screened":
            settings |= {"exact_layers": self.exact_layers, "confirm": self.confirm}
        if self.ablation == "patch":
            settings |= {"patch_from": self.patch_from, "direction": self.direction}
        if "other_user" in (self.contrast, self.patch_from if self.ablation == "patch" else None):
            settings["n_donors"] = self.n_donors
        return {
            "call": "score_heads",
            "method": self.method,
            **settings,
            "prompt": self.prompt.to_dict(),
            "model": describe_model(self.model),
            "examples": [example.id for example in self.examples],
            "data": data_digest(self.users, self.examples),
        }

    def collect(self, found: Units, engine: Engine | None = None) -> HeadScores:
        """Scores of the examples whose units were made."""
        units, examples = list(found.made.values()), [self.by_key[key] for key in found.made]

        def gather(prefix: str) -> dict[str, Tensor]:
            names = [name for name in units[0] if name.startswith(prefix)]
            return {name[len(prefix) :]: torch.stack([unit[name] for unit in units]) for name in names}

        components = gather("component.")
        values = components["own"] - components[self.contrast] if self.contrast else components["own"]
        dated = {user.id: "strictly older documents" if user.dated else "leave-one-out" for user in self.users}
        manifest = {**self.fingerprint(), "sign": SIGN, "unit": "nats per token", "profiles": dated}
        found.note(manifest, engine)
        return HeadScores(
            values,
            example_ids=[example.id for example in examples],
            user_ids=[example.user_id for example in examples],
            components=components,
            nll=gather("nll."),
            exact=torch.stack([unit["exact"].bool() for unit in units]) if "exact" in units[0] else None,
            manifest=manifest,
        )


def aligned_z(
    model: HookedModel, base: Prompt, source: Prompt, positions: Positions
) -> tuple[Float[Tensor, "layer pos head d_head"], Where]:
    """z of `source` at the positions of `base` that may be patched, and which these are.

    Response positions align by their offset. Elsewhere the two prompts must have equal spans, and
    outside the profile only positions with equal ids are patched.
    """
    if positions == "response":
        z = record_z(model, source, positions="response")
        return z[:, : len(base.response_tokens)], lambda n_pos: slice(None)
    if base.spans != source.spans:
        raise PromptError(
            f"example {base.example_id!r}: patching positions={positions!r} needs profiles of equal token length, "
            f"found {base.spans['profile']} and {source.spans['profile']}; use positions='response'"
        )
    same = base.tokens == source.tokens
    first, stop = base.spans["profile"]
    same[first:stop] = True
    if positions == "profile":
        same[:first], same[stop:] = False, False
    chosen = same[:-1]
    z = record_z(model, source, positions="all")[:, :-1][:, chosen]
    return z, lambda n_pos: chosen[None, :n_pos]


def donors_of(example: Example, users: Sequence[User], n: int, seed: int) -> list[User]:
    """At most `n` other users whose profiles stand in for the example's own."""
    others = [user for user in users if user.id != example.user_id]
    return random.Random(f"{seed}|{example.id}").sample(others, min(n, len(others)))


def data_digest(users: Sequence[User], examples: Sequence[Example]) -> str:
    """A digest of every text that results depend on."""
    texts = [[u.id, [[d.id, d.date, dict(d.fields)] for d in u.history]] for u in users]
    asked = [[e.id, e.input, e.reference, [d.id for d in e.profile]] for e in examples]
    return hashlib.sha256(json.dumps([texts, asked], sort_keys=True, default=str).encode()).hexdigest()[:16]
