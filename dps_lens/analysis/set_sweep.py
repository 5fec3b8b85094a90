"""Runs sets of heads, chosen and random, through conditions of held-out examples; resumable."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float64
from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.analysis.ablation import check_held_out
from dps_lens.analysis.effects import SetEffects, stack_draws
from dps_lens.analysis.rankings import Family, Rankings, Select, rankings
from dps_lens.data import Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.tokenizer import PromptTokenizer
from dps_lens.errors import ScoreError
from dps_lens.families import draw_seed, random_heads
from dps_lens.heads import HeadSet
from dps_lens.intervene import Ablation, Positions
from dps_lens.model import HookedModel, Runner, describe_model
from dps_lens.runs import Engine, RunFolder, Units, Work, kept, make_units
from dps_lens.scores import HeadScores
from dps_lens.scoring.branches import BatchSize, Branches
from dps_lens.scoring.sweep import data_digest

_NEUTRAL_PROMPT, _NEUTRAL_RESPONSE = 16, 48


@dataclass(frozen=True)
class Condition:
    """A run that sets of heads are edited in.

    Attributes:
        full: the condition whose unedited NLL this is.
        branches: of its prompt.
        edited: losses `[row pos]` of the response under sets of heads `[row layer head]`; None where only the
            unedited NLL is wanted.
        drawn: random sets are measured, too.
    """

    full: str
    branches: Branches
    edited: Callable[[Bool[Tensor, "row layer head"]], Float64[Tensor, "row pos"]] | None = None
    drawn: bool = False


def ablated(full: str, branches: Branches, *, drawn: bool = False, **edit: Any) -> Condition:
    """A condition in which heads are ablated, or patched by `values` and `where`."""
    return Condition(full, branches, partial(branches.ablated_losses, **edit), drawn)


Self = TypeVar("Self", bound="SetSweep")


@dataclass
class SetSweep:
    """Sets of heads, chosen and random, and the held-out examples they meet; `call` names the run in errors."""

    call: str
    model: HookedModel
    users: list[User]
    families: Mapping[str, Family]
    ks: tuple[int, ...]
    n_random: int
    select: Select | Mapping[str, Select]
    exclude: Mapping[str, HeadSet] | None
    max_examples: int | None
    ngram: int
    seed: int
    batch_size: BatchSize
    ablation: Ablation
    positions: Positions
    prompt: PromptConfig
    optional: bool = False
    """Go on where no family is given or defined."""

    @classmethod
    def of(
        cls: type[Self],
        call: str,
        model: HookedModel,
        users: Sequence[User],
        families: Mapping[str, Family],
        ks: Sequence[int],
        *,
        ablation: Ablation | None = None,
        positions: Positions | None = None,
        prompt: PromptConfig | None = None,
        ngram: int = 1,
        batch_size: BatchSize = "auto",
        **options: Any,
    ) -> Self:
        """With the settings that the families were scored with, where none are given.

        Raises:
            ScoreError: as `shared_settings`, or an example was scored on.
        """
        shared = shared_settings(call, families, ablation=ablation, positions=positions, prompt=prompt)
        return cls(
            call, model, list(users), families, tuple(ks), ngram=ngram, batch_size=batch_size, **shared, **options
        )

    def __post_init__(self) -> None:
        if self.n_random < 0 or self.ngram < 1:
            raise ScoreError(f"{self.call}: n_random is not negative and ngram at least 1")
        if self.max_examples is not None and self.max_examples < 1:
            raise ScoreError(f"{self.call}: max_examples {self.max_examples} leaves nothing to measure")
        for user in self.users:
            if not user.examples:
                raise ScoreError(f"{self.call}: user {user.id!r} has no evaluation example; leave the user out")
        for family in self.families.values():
            if isinstance(family, HeadScores):
                check_held_out(self.call, family, self.examples)

    @cached_property
    def examples(self) -> list[Example]:
        """Evaluation examples, user by user."""
        most = self.max_examples
        return [e for user in self.users for e in (user.examples[-most:] if most else user.examples)]

    @cached_property
    def runner(self) -> Runner:
        return Runner.of(self.model)

    @cached_property
    def ranked(self) -> tuple[Rankings, dict[str, str]]:
        """Sets of every family, user and k, and the families that are not defined."""
        undefined = {
            name: str(family.manifest.get("reason", "NaN scores"))
            for name, family in self.families.items()
            if isinstance(family, HeadScores) and not family.defined
        }
        if self.optional and len(undefined) == len(self.families):
            return {}, undefined
        return rankings(self.call, self.families, self.users, self.ks, self.select, self.exclude, self.seed)

    def build(self, example: Example, profile: Any) -> Prompt:
        return build_prompt(self.model, example, profile, config=self.prompt)

    def branches(self, example: Example, profile: Any) -> Branches:
        return self.branches_of(self.build(example, profile))

    def branches_of(self, prompt: Prompt) -> Branches:
        return Branches(
            self.runner, prompt, ablation=self.ablation, positions=self.positions, batch_size=self.batch_size
        )

    def draws_of(self, number: int) -> range:
        """Random draws that this example measures: those of a user are dealt out to the user's examples."""
        own = [index for index, e in enumerate(self.examples) if e.user_id == self.examples[number].user_id]
        return range(own.index(number), self.n_random, len(own))

    def masks(self, number: int) -> tuple[Bool[Tensor, "chosen layer head"], Bool[Tensor, "random layer head"]]:
        """Chosen sets by family and k, and their random sets by family, k and draw."""
        cfg, user = self.model.cfg, self.examples[number].user_id
        chosen = [heads for sets in self.ranked[0].values() for heads in sets[user]]
        # Nearest layers step in where a layer has too few other heads.
        random = [
            random_heads(self.model, heads, match="nearest", seed=draw_seed(self.seed, draw))
            for heads in chosen
            for draw in self.draws_of(number)
        ]
        empty = torch.zeros(0, cfg.n_layers, cfg.n_heads, dtype=torch.bool)
        return tuple(  # type: ignore[return-value]
            torch.stack([heads.mask(cfg) for heads in group]) if group else empty for group in (chosen, random)
        )

    def copied(self, example: Example) -> Float64[Tensor, " pos"]:
        """1 for response tokens that end an n-gram of the response which the own profile holds."""
        prompt = self.build(example, "own")
        start, stop = prompt.spans["profile"]
        return copied_tokens(prompt.response_tokens.tolist(), prompt.tokens[start:stop].tolist(), self.ngram)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        sets, undefined = self.ranked
        tested = {
            family: {user: [str(heads) for heads in of_k] for user, of_k in by_user.items()}
            for family, by_user in sets.items()
        }
        return {
            "call": self.call,
            "ablation": self.ablation,
            "positions": self.positions,
            "ks": self.ks,
            "n_random": self.n_random,
            "select": self.select if isinstance(self.select, str) else dict(self.select),
            "ngram": self.ngram,
            "seed": self.seed,
            "prompt": self.prompt.to_dict(),
            "model": describe_model(self.model),
            "families": list(sets),
            "sets": tested,
            "undefined": undefined,
            "examples": [example.id for example in self.examples],
            "data": data_digest(self.users, self.examples),
        }

    @cached_property
    def by_key(self) -> dict[str, int]:
        """Numbers of the examples by the keys of their units."""
        return {f"{example.user_id}|{example.id}": number for number, example in enumerate(self.examples)}

    def units(
        self,
        folder: RunFolder | None,
        measure: Callable[[int, Example], dict[str, Tensor]],
        description: str,
        progress: bool,
    ) -> list[dict[str, Tensor]]:
        """What `measure` gives for every example and its number; finished ones are read from the folder."""
        bar = tqdm(self.by_key.items(), desc=description, unit="example", disable=None if progress else True)
        return [kept(folder, key, partial(measure, number, self.examples[number])) for key, number in bar]


@dataclass
class EditSweep(SetSweep, Work):
    """A run that edits sets of heads in conditions of every example, and measures the losses."""

    @abstractmethod
    def conditions(self, number: int, example: Example) -> dict[str, Condition]:
        """What the sets are edited in."""

    def more(self) -> dict[str, Any]:
        """What else decides the result."""
        return {}

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | self.more()

    def owner(self, key: str) -> str:
        return self.examples[self.by_key[key]].user_id

    def make(self, key: str, given: Any = None) -> dict[str, Tensor]:
        number = self.by_key[key]
        return self.unit(number, self.conditions(number, self.examples[number]))

    def unit(self, number: int, conditions: Mapping[str, Condition]) -> dict[str, Tensor]:
        """What one example gives: `full.…` [2], `chosen.…` [family k 2], `draws.…` [family k draw 2]."""
        chosen, random = self.masks(number)
        size = (len(self.ranked[0]), len(self.ks))
        copied = self.copied(self.examples[number])
        found: dict[str, Tensor] = {}
        for name, condition in conditions.items():
            clean = condition.branches.losses
            # Neutral text is not the user's response and copies nothing.
            weights = torch.zeros_like(clean) if name == "neutral" else copied
            found[f"full.{condition.full}"] = _split(clean[None], weights)[0]
            if condition.edited is None:
                continue
            masks = torch.cat([chosen, random]) if condition.drawn else chosen
            change = _split(condition.edited(masks) - clean, weights)
            found[f"chosen.{name}"] = change[: len(chosen)].reshape(*size, 2)
            if condition.drawn:
                found[f"draws.{name}"] = change[len(chosen) :].reshape(*size, len(self.draws_of(number)), 2)
        return found

    def run(self, out: str | Path | None, force: bool, progress: bool, engine: Engine | None = None) -> SetEffects:
        """Measure every example; finished ones are read from `out`."""
        manifest = self.fingerprint()
        if out is not None and force:
            (Path(out) / "effects.json").unlink(missing_ok=True)  # else old effects load when this run is cut short
        folder = RunFolder(out, manifest, force=force) if out is not None else None
        found = make_units(
            self, list(self.by_key), folder=folder, engine=engine, what="editing heads", progress=progress
        )
        found.note(manifest, engine)
        effects = self.collect(found, manifest)
        if out is not None:
            effects.save(out)
        return effects

    def collect(self, found: Units, manifest: dict[str, Any]) -> SetEffects:
        """Effects on the examples whose units were made."""
        units, numbers = list(found.made.values()), [self.by_key[key] for key in found.made]
        user_ids = tuple(self.examples[number].user_id for number in numbers)

        def group(prefix: str) -> dict[str, list[Tensor]]:
            return {name[len(prefix) :]: [u[name] for u in units] for name in units[0] if name.startswith(prefix)}

        draws = {}
        for name, rows in group("draws.").items() if self.n_random else ():
            dealt = [
                dict(zip(self.draws_of(number), row.unbind(2), strict=True))
                for number, row in zip(numbers, rows, strict=True)
            ]
            draws[name] = stack_draws(dealt, user_ids, self.n_random)
        return SetEffects(
            tuple(self.ranked[0]),
            self.ks,
            user_ids,
            tuple(self.examples[number].id for number in numbers),
            {name: torch.stack(rows) for name, rows in group("full.").items()},
            {name: torch.stack(rows) for name, rows in group("chosen.").items()},
            draws,
            manifest,
        )


def shared_settings(
    call: str,
    families: Mapping[str, Family],
    *,
    ablation: Ablation | None,
    positions: Positions | None,
    prompt: PromptConfig | None,
) -> dict[str, Any]:
    """Ablation, positions and prompts: as asked for, else as the families were scored, else the defaults.

    Raises:
        ScoreError: scores were made with other settings than asked for, or than each other.
    """
    found: dict[str, Any] = {"ablation": ablation, "positions": positions, "prompt": prompt and prompt.to_dict()}
    for name, family in families.items():
        manifest = family.manifest if isinstance(family, HeadScores) else {}
        if manifest.get("call") != "score_heads":
            continue
        for key, value in found.items():
            if key == "ablation" and "patch" in (value, manifest[key]):
                continue  # a patch is no ablation that heads must have been chosen with
            if value is not None and value != manifest[key]:
                raise ScoreError(
                    f"{call}: family {name!r} was scored with {key} {manifest[key]!r}, asked for is {value!r}; score "
                    f"it anew, or pass its heads, scores.top(k), to test them with other {key}"
                )
            found[key] = manifest[key]
    config = PromptConfig(**found["prompt"]) if found["prompt"] else PromptConfig()
    return {"ablation": found["ablation"] or "zero", "positions": found["positions"] or "response", "prompt": config}


def copied_tokens(response: Sequence[int], profile: Sequence[int], n: int) -> Float64[Tensor, " pos"]:
    """1 where a response token ends an n-gram of the response that the profile holds, else 0.

    >>> copied_tokens([7, 1, 2, 3], [1, 2, 9], 2).tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    held = {tuple(profile[index : index + n]) for index in range(len(profile) - n + 1)}
    ends = [index >= n - 1 and tuple(response[index - n + 1 : index + 1]) in held for index in range(len(response))]
    return torch.tensor(ends, dtype=torch.float64)


def neutral_prompt(model: HookedModel, text: str) -> Prompt:
    """A text outside any chat: its first tokens as prompt, the next ones as response."""
    ids = PromptTokenizer(model).plain(text)
    if len(ids) < _NEUTRAL_PROMPT + 2:
        raise ScoreError(
            f"a neutral text needs more than {_NEUTRAL_PROMPT + 1} tokens, found {len(ids)}: {text[:40]!r}"
        )
    start, stop = _NEUTRAL_PROMPT, min(len(ids), _NEUTRAL_PROMPT + _NEUTRAL_RESPONSE)
    spans = {"profile": (0, 0), "task": (0, start), "response": (start, stop)}
    return Prompt(torch.tensor(ids[:stop]), spans, text, "none", text[:40], "", ())


def _split(losses: Float64[Tensor, "row pos"], copied: Float64[Tensor, " pos"]) -> Float64[Tensor, "row 2"]:
    """Means over the response: of all tokens, and of the copied ones with the rest counted as 0."""
    return torch.stack([losses.mean(-1), (losses * copied).mean(-1)], dim=-1)
