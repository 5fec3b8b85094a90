"""Preference Contribution Scores of every head (PCS, arXiv 2604.22345)."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.data import Discovery, Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.errors import PromptError, ScoreError
from dps_lens.intervene import ABLATIONS, POSITIONS, Ablation, Positions, Where, record_z
from dps_lens.model import HookedModel, Runner, describe_model
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.scoring.branches import BatchSize, Branches, single_heads

Contrast: TypeAlias = Literal["no_profile", "other_user"]
Direction: TypeAlias = Literal["noising", "denoising"]

SIGN = "positive: ablating the head raises the NLL of the user's own text"


def score_heads(
    model: HookedModel,
    users: Sequence[User],
    *,
    contrast: Contrast | None = "no_profile",
    ablation: Ablation = "zero",
    positions: Positions = "response",
    method: Literal["exact"] = "exact",
    discovery: Discovery = "history",
    max_examples: int | None = None,
    prompt: PromptConfig | None = None,
    patch_from: Contrast = "no_profile",
    direction: Direction = "noising",
    n_donors: int = 3,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    out: str | Path | None = None,
    force: bool = False,
    progress: bool = True,
) -> HeadScores:
    """Score every head of a model on the discovery examples of users.

    The paper's score of head (l, h) is `PCS = NLL(head ablated) − NLL`, on the response, in nats per
    token. It also rewards heads that matter for any text. The profile-specific score, the default,
    subtracts the same difference for the same task and response without the user's profile; it equals
    the part of the personalisation gain `NLL(no profile) − NLL(own profile)` that the ablation takes.

    Args:
        model: a hooked model.
        users: their discovery examples are used, never their evaluation examples (but see `discovery`).
        contrast: `"no_profile"`, `"other_user"` (mean over `n_donors` other users' profiles) or None for
            the paper's PCS.
        ablation: `"zero"`, `"mean"` (per head, over the edited positions of these examples, for each
            prompt condition on its own), `"patch"` or `"uniform"`.
        positions: `"response"` (from the last prompt token on), `"all"` or `"profile"`.
        method: `"exact"`: one branch a head.
        discovery: `"history"`, or `"labelled"` for tasks whose histories hold no pairs; then evaluate on
            other users.
        max_examples: the newest so many discovery examples of each user.
        prompt: how prompts are built.
        patch_from: for `"patch"`, the counterfactual prompt: without profile, or with another user's.
        direction: for `"patch"`: `"noising"` puts the counterfactual run's z into the profile run;
            `"denoising"` the reverse, and the score is the recovered log-probability.
        n_donors: other users for `"other_user"`, drawn with `seed`.
        batch_size: branches a batch; `"auto"` chooses by device.
        out: a run folder; a run that is started again there resumes.
        force: drop what `out` holds.
        progress: show a progress bar.

    Returns:
        scores with `components` and the NLL of the unablated model in every condition.

    Raises:
        ScoreError: the settings do not fit together, or a user has no discovery example.
        RunError: `out` holds a run with other settings.
    """
    sweep = _Sweep(
        model,
        list(users),
        contrast=contrast,
        ablation=ablation,
        positions=positions,
        discovery=discovery,
        max_examples=max_examples,
        prompt=prompt or PromptConfig(),
        patch_from=patch_from,
        direction=direction,
        n_donors=n_donors,
        seed=seed,
        batch_size=batch_size,
    )
    if method != "exact":
        raise ScoreError(f"score_heads: method {method!r} is unknown; use 'exact'")
    folder = RunFolder(out, sweep.fingerprint(), force=force) if out is not None else None
    units = []
    bar = tqdm(sweep.examples, desc="scoring heads", unit="example", disable=None if progress else True)
    for example in bar:
        key = f"{example.user_id}|{example.id}"
        unit = folder.get(key) if folder else None
        if unit is None:
            unit = sweep.unit(example)
            if folder:
                folder.put(key, unit)
        units.append(unit)
    scores = sweep.collect(units)
    if out is not None:
        scores.save(out)
    return scores


@dataclass(frozen=True)
class _Sweep:
    """One setting of `score_heads`: what is run for an example, and how results are put together."""

    model: HookedModel
    users: list[User]
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

    def __post_init__(self) -> None:
        for name, value, known in (
            ("ablation", self.ablation, ABLATIONS),
            ("positions", self.positions, POSITIONS),
            ("contrast", self.contrast, ("no_profile", "other_user", None)),
            ("patch_from", self.patch_from, ("no_profile", "other_user")),
            ("direction", self.direction, ("noising", "denoising")),
        ):
            if value not in known:
                raise ScoreError(f"score_heads: {name} {value!r} is unknown; use one of {known}")
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
    def runner(self) -> Runner:
        return Runner.of(self.model)

    @cached_property
    def by_id(self) -> dict[str, User]:
        return {user.id: user for user in self.users}

    def donors(self, example: Example) -> list[User]:
        """Other users of the same task, the same for every run with this seed."""
        others = [user for user in self.users if user.id != example.user_id]
        return random.Random(f"{self.seed}|{example.id}").sample(others, min(self.n_donors, len(others)))

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

    def unit(self, example: Example) -> dict[str, Tensor]:
        """Components `[layer head]` and clean NLLs of one example."""
        if self.ablation == "patch":
            return self.patched(example)
        found = {}
        for name, prompts in self.conditions(example).items():
            swept = [self.sweep(prompt, self.means.get(name)) for prompt in prompts]
            found[f"component.{name}"] = torch.stack([score for score, _ in swept]).mean(0)
            found[f"nll.{name}"] = torch.tensor([nll for _, nll in swept], dtype=torch.float64).mean()
        return found

    def sweep(
        self, prompt: Prompt, values: Tensor | None = None, where: Where | None = None
    ) -> tuple[Float[Tensor, "layer head"], float]:
        """PCS of every head on one prompt, and the clean NLL."""
        cfg = self.model.cfg
        branches = Branches(
            self.runner, prompt, ablation=self.ablation, positions=self.positions, batch_size=self.batch_size
        )
        ablated = branches.ablated(single_heads(cfg.n_layers, cfg.n_heads), values, where)
        return (ablated - branches.nll).float().reshape(cfg.n_layers, cfg.n_heads), branches.nll

    def patched(self, example: Example) -> dict[str, Tensor]:
        """One example with z patched between its own prompt and a counterfactual one."""
        own = self.build(example, "own")
        scores, nlls = [], []
        for other in self.counterfactuals(example, self.patch_from):
            base, source = (own, other) if self.direction == "noising" else (other, own)
            values, where = _aligned(self.model, base, source, self.positions)
            score, nll = self.sweep(base, values, where)
            # A denoising patch lowers the NLL; what it recovers is counted as positive.
            scores.append(score if self.direction == "noising" else -score)
            nlls.append(nll)
        base_name = "own" if self.direction == "noising" else self.patch_from
        return {
            "component.own": torch.stack(scores).mean(0),
            f"nll.{base_name}": torch.tensor(nlls, dtype=torch.float64).mean(),
        }

    @cached_property
    def means(self) -> dict[str, Float[Tensor, "layer head d_head"]]:
        """Mean z per head over the edited positions of all examples, by component; for `mean` only."""
        if self.ablation != "mean":
            return {}
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for example in tqdm(self.examples, desc="mean of z", unit="example", disable=None):
            for name, prompts in self.conditions(example).items():
                for prompt in prompts:
                    start, stop = prompt.spans["profile"]
                    if self.positions == "profile" and stop <= start:
                        continue
                    z = record_z(self.model, prompt, positions=self.positions).double()
                    totals[name] = totals.get(name, torch.zeros(())) + z.sum(1)
                    counts[name] = counts.get(name, 0) + z.shape[1]
        means = {name: (total / counts[name]).float() for name, total in totals.items()}
        # A prompt without profile has no profile positions; its edit is empty whatever the values are.
        return {name: means.get(name, torch.zeros_like(means["own"])) for name in ("own", self.contrast) if name}

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        settings = {
            name: getattr(self, name)
            for name in ("contrast", "ablation", "positions", "discovery", "max_examples", "seed", "batch_size")
        }
        if self.ablation == "patch":
            settings |= {"patch_from": self.patch_from, "direction": self.direction}
        if "other_user" in (self.contrast, self.patch_from if self.ablation == "patch" else None):
            settings["n_donors"] = self.n_donors
        return {
            "call": "score_heads",
            "method": "exact",
            **settings,
            "prompt": self.prompt.to_dict(),
            "model": describe_model(self.model),
            "examples": [example.id for example in self.examples],
            "data": _digest(self.users, self.examples),
        }

    def collect(self, units: list[dict[str, Tensor]]) -> HeadScores:
        def gather(prefix: str) -> dict[str, Tensor]:
            names = [name for name in units[0] if name.startswith(prefix)]
            return {name[len(prefix) :]: torch.stack([unit[name] for unit in units]) for name in names}

        components = gather("component.")
        values = components["own"] - components[self.contrast] if self.contrast else components["own"]
        dated = {user.id: "strictly older documents" if user.dated else "leave-one-out" for user in self.users}
        manifest = {**self.fingerprint(), "sign": SIGN, "unit": "nats per token", "profiles": dated}
        return HeadScores(
            values,
            example_ids=[example.id for example in self.examples],
            user_ids=[example.user_id for example in self.examples],
            components=components,
            nll=gather("nll."),
            manifest=manifest,
        )


def _aligned(
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


def _digest(users: Sequence[User], examples: Sequence[Example]) -> str:
    """A digest of every text that the scores depend on."""
    texts = [[u.id, [[d.id, d.date, dict(d.fields)] for d in u.history]] for u in users]
    asked = [[e.id, e.input, e.reference, [d.id for d in e.profile]] for e in examples]
    return hashlib.sha256(json.dumps([texts, asked], sort_keys=True, default=str).encode()).hexdigest()[:16]
