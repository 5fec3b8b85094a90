"""Who feeds a head, and what it hands on: direct path patching between chosen heads, on held-out examples."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.data import Example, PromptConfig, User, build_prompt
from dps_lens.data.conditions import prompts_in
from dps_lens.data.examples import by_key, held_out_examples, unit_key
from dps_lens.data.identity import describe_inputs
from dps_lens.errors import ScoreError
from dps_lens.found import FoundHeads
from dps_lens.heads import Head, HeadSet
from dps_lens.literals import AGAINST, Against
from dps_lens.model import HookedModel, ModelConfig, check_attention_writes, has_weights, runner_of
from dps_lens.paths.direct import INTO, DirectPaths, Into
from dps_lens.paths.result import PathEffects, measured
from dps_lens.scoring import CleanRun
from dps_lens.selection import HeadSource, check_held_out, inherited
from dps_lens.work import BatchSize, Engine, Run, RunConfig, Work

_CALL = "patch_paths"


def patch_paths(
    model: HookedModel,
    users: Sequence[User],
    senders: HeadSet | FoundHeads,
    receivers: HeadSet | FoundHeads,
    *,
    into: Into | Sequence[Into] = ("q", "k", "v"),
    against: Against = "other_user",
    n_donors: int = 1,
    n_random: int = 2,
    max_examples: int | None = 1,
    prompt_config: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> PathEffects:
    """What each path carries of what the own profile brings: document → head, head → head, head → logits.

    A path from one head to another is patched exactly (path patching, Wang et al. 2022, arXiv 2211.00593): what the
    sender writes at the response positions becomes that of a run with the other profile where the receiver reads it,
    into its queries, keys or values alone, and nowhere else; the receiver's output follows, and so does all behind it.
    A path to the logits passes the final norm only. A document is cut off from a head by hiding its tokens from the
    head's queries at the response positions. What senders write inside the profile is not followed.

    Args:
        model: a hooked model. Queries, keys and values are read from the attention that TransformerLens recomputes.
        users: their evaluation examples are used. At least six allow claims about edges.
        senders: heads whose output is followed. Of found heads, the set of all users.
        receivers: heads that may read it; those in the layers behind a sender do.
        into: what of a receiver is patched: `"q"`, `"k"`, `"v"`, one at a time, or `"resid"`, all three at once.
        against: where the other output comes from: a run with another user's profile, or without one.
        n_donors: other users, for `"other_user"`.
        n_random: random other heads of each layer, measured in the place of every sender and of every cut-off head;
            senders and receivers only where a layer has no others.
        max_examples: the newest so many evaluation examples of each user.
        prompt_config: how prompts are built; by default as for the heads, where they were found.
        seed: of donors and random heads.
        out: a run folder; a run that is started again there resumes.
        engine: as in `score_heads`.
        run_config: force, rows of a batch, progress bars.

    Raises:
        ScoreError: the settings do not fit together, or heads were found on one of these examples, or with other
            prompts.
        HeadError: a head lies outside the model.
        ModelCheckError: the architecture's attention cannot be read or edited.
        RunError: `out` holds a run with other settings.
    """
    run = Run(model, PathEffects, out, engine, run_config)
    given: dict[str, HeadSource] = {"senders": senders, "receivers": receivers}
    found = {name: family for name, family in given.items() if isinstance(family, FoundHeads)}
    shared = inherited(_CALL, found, prompt_config=prompt_config, uses=("prompt_config",))
    work = PathWork(
        model,
        list(users),
        _heads(senders),
        _heads(receivers),
        into=(into,) if isinstance(into, str) else tuple(into),
        against=against,
        n_donors=n_donors,
        n_random=n_random,
        max_examples=max_examples,
        prompt_config=shared.prompt_config,
        seed=seed,
        batch_size=run.config.batch_size,
    )
    for family in found.values():
        check_held_out(_CALL, family, work.examples)
    run.open(work.fingerprint)
    return run.keep(work.run(run))


def _heads(given: HeadSet | FoundHeads) -> HeadSet:
    if isinstance(given, FoundHeads):
        return given.heads
    if not isinstance(given, HeadSet):
        raise ScoreError(
            f"{_CALL}: senders and receivers are a HeadSet, such as scores.top(10) or HeadSet.parse('L14H3'), or what "
            f"find_heads found; got a {type(given).__name__}"
        )
    return given


@dataclass
class PathWork(Work):
    """The run of `patch_paths`, an example a unit."""

    model: HookedModel
    users: Sequence[User]
    senders: HeadSet
    receivers: HeadSet
    into: tuple[Into, ...]
    against: Against = "other_user"
    n_donors: int = 1
    n_random: int = 2
    max_examples: int | None = None
    prompt_config: PromptConfig = field(default_factory=PromptConfig)
    seed: int = 0
    batch_size: BatchSize = "auto"

    def __post_init__(self) -> None:
        unknown = [one for one in self.into if one not in INTO]
        if unknown or not self.into:
            named = f"into {unknown[0]!r} is unknown" if unknown else "into= is empty"
            raise ScoreError(f"{_CALL}: {named}; use one or several of {', '.join(INTO)}")
        if self.against not in AGAINST:
            raise ScoreError(f"{_CALL}: against {self.against!r} is unknown; use 'other_user' or 'no_profile'")
        if self.against == "other_user" and len(self.users) < 2:
            raise ScoreError(f"{_CALL}: against='other_user' needs at least two users; use 'no_profile'")
        if not len(self.senders) or not len(self.receivers):
            raise ScoreError(f"{_CALL}: give at least one sender and one receiver")
        check_whole(ScoreError, f"{_CALL}: n_donors", self.n_donors, least=1)
        check_whole(
            ScoreError, f"{_CALL}: n_random", self.n_random, least=1, why="edges are compared with random heads"
        )
        self.nodes.mask(self.model.cfg)
        if has_weights(self.model):
            check_attention_writes(_CALL, self.model)

    @property
    def nodes(self) -> HeadSet:
        return self.senders | self.receivers

    @cached_property
    def controls(self) -> dict[str, HeadSet]:
        """Of each node, random other heads of its layer."""
        return {str(head): others_of(head, self.nodes, self.model.cfg, self.n_random, self.seed) for head in self.nodes}

    @cached_property
    def examples(self) -> list[Example]:
        """Evaluation examples, user by user."""
        return held_out_examples(_CALL, self.users, self.max_examples)

    @cached_property
    def by_key(self) -> dict[str, Example]:
        return by_key(self.examples)

    def owner(self, key: str) -> str:
        return self.by_key[key].user_id

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the result, for the run folder and the manifest."""
        return {
            "call": _CALL,
            "senders": str(self.senders),
            "receivers": str(self.receivers),
            "into": list(self.into),
            "against": self.against,
            "n_donors": self.n_donors,
            "n_random": self.n_random,
            "max_examples": self.max_examples,
            "seed": self.seed,
            **describe_inputs(self.model, self.users, self.examples, self.prompt_config),
            "examples": [unit_key(example) for example in self.examples],
        }

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """Effects on one example: `paths` [into sender receiver], `direct` and `total` [head], `documents` [head
        document]."""
        example, config = self.by_key[key], self.prompt_config
        own = self._clean(build_prompt(self.model, example, config=config))
        others = prompts_in(
            self.model,
            example,
            self.against,
            self.users,
            n_donors=self.n_donors,
            seed=self.seed,
            config=config,
        )
        effects = [self._between(own, self._clean(prompt)) for prompt in others]
        made = {name: torch.stack([one[name] for one in effects]).mean(0) for name in effects[0]}
        return made | {"documents": self._documents(own)}

    def _clean(self, prompt: Any) -> CleanRun:
        return CleanRun(runner_of(self.model), prompt, keep_z=True, batch_size=self.batch_size)

    def _between(self, own: CleanRun, other: CleanRun) -> dict[str, Tensor]:
        heads, writers = measured(self.nodes, self.controls), measured(self.senders, self.controls)
        direct = DirectPaths(own)
        assert other.z is not None
        written = dict(zip(heads, direct.writes(heads, other.z), strict=True))
        received: dict[int, dict[Into, Tensor]] = {}
        below = {
            layer: [place for place, head in enumerate(writers) if head.layer < layer]
            for layer in layers_of(self.receivers)
        }
        for layer, places in below.items():
            if places:
                received[layer] = direct.received(layer, torch.stack([written[writers[p]] for p in places]), self.into)
        # All edges of an example are rows of the same batches.
        edges = [
            (part, writer, reader, received[head.layer][name][row, :, head.head])
            for reader, head in enumerate(self.receivers)
            for part, name in enumerate(self.into)
            for row, writer in enumerate(below[head.layer])
        ]
        found = torch.full((len(self.into), len(writers), len(self.receivers)), torch.nan, dtype=torch.float64)
        if edges:
            parts, senders, readers, z = zip(*edges, strict=True)
            losses = own.replaced_losses([self.receivers[reader] for reader in readers], torch.stack(z))
            found[parts, senders, readers] = losses.mean(-1) - own.value
        patched = torch.stack([other.z[head.layer, :, head.head] for head in heads])
        return {
            "paths": found,
            "direct": direct.to_logits(torch.stack([written[head] for head in heads])).mean(-1) - own.value,
            "total": own.replaced_losses(heads, patched).mean(-1) - own.value,
        }

    def _documents(self, own: CleanRun) -> Float64[Tensor, "head document"]:
        heads, spans = measured(self.nodes, self.controls), own.prompt.items
        found = torch.full((len(heads), self.prompt_config.items), torch.nan, dtype=torch.float64)
        if spans:
            direct = DirectPaths(own)
            blind = {layer: direct.cut(layer, spans) for layer in layers_of(heads)}
            z = torch.cat([blind[head.layer][:, :, head.head] for head in heads])
            losses = own.replaced_losses([head for head in heads for _ in spans], z).mean(-1)
            found[:, : len(spans)] = losses.reshape(len(heads), len(spans)) - own.value
        return found

    def run(self, run: Run) -> PathEffects:
        """Measure every example; finished ones are read from the run's folder."""
        units = run.units(self, list(self.by_key), "patching paths").made
        examples = [self.by_key[key] for key in units]
        stacked = {
            name: torch.stack([unit[name] for unit in units.values()])
            for name in ("paths", "direct", "total", "documents")
        }
        return PathEffects(
            self.senders,
            self.receivers,
            self.controls,
            tuple(self.into),
            tuple(example.user_id for example in examples),
            tuple(example.id for example in examples),
            **stacked,
            manifest=run.manifest,
        )


def layers_of(heads: Iterable[Head]) -> list[int]:
    return sorted({head.layer for head in heads})


def others_of(head: Head, nodes: HeadSet, cfg: ModelConfig, n: int, seed: int) -> HeadSet:
    """At most `n` random other heads of a head's layer; nodes only where there are no others left."""
    layer = [Head(head.layer, index) for index in range(cfg.n_heads) if index != head.head]
    rng = random.Random(f"{_CALL}|{seed}|{head.layer}")
    shuffled = rng.sample(layer, len(layer))
    return HeadSet(sorted(shuffled, key=lambda one: one in nodes)[:n], "random", (cfg.n_layers, cfg.n_heads))
