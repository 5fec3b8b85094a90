"""Who feeds a head, and what it hands on: direct path patching between chosen heads, on held-out examples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float64
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.data import PromptConfig, User
from dps_lens.errors import ScoreError
from dps_lens.found import FoundHeads
from dps_lens.heads import Head, HeadSet
from dps_lens.literals import Against
from dps_lens.model import HookedModel, check_attention_writes, has_weights
from dps_lens.paths.direct import INTO, DirectPaths, Into
from dps_lens.paths.pairs import PairWork
from dps_lens.paths.result import PathEffects, measured
from dps_lens.scoring import CleanRun
from dps_lens.selection import HeadSource, check_held_out, inherited, random_beside
from dps_lens.work import Engine, Run, RunConfig

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
        model=model,
        users=list(users),
        senders=_heads(senders),
        receivers=_heads(receivers),
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


@dataclass(kw_only=True)
class PathWork(PairWork):
    """The run of `patch_paths`."""

    call: ClassVar[str] = _CALL

    senders: HeadSet
    receivers: HeadSet
    into: tuple[Into, ...]
    n_random: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [one for one in self.into if one not in INTO]
        if unknown or not self.into:
            named = f"into {unknown[0]!r} is unknown" if unknown else "into= is empty"
            raise ScoreError(f"{_CALL}: {named}; use one or several of {', '.join(INTO)}")
        if not len(self.senders) or not len(self.receivers):
            raise ScoreError(f"{_CALL}: give at least one sender and one receiver")
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
        return {
            str(head): random_beside(self.model, head, self.n_random, avoid=self.nodes, seed=self.seed)
            for head in self.nodes
        }

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {
            "senders": str(self.senders),
            "receivers": str(self.receivers),
            "into": list(self.into),
            "n_random": self.n_random,
        }

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """Effects on one example: `paths` [into writer receiver], `direct` and `total` [head], `documents` [head
        document]."""
        prompt, others = self.prompts(self.by_key[key])
        own = self.clean_run(prompt)
        effects = [self._between(own, self.clean_run(other)) for other in others]
        made = {name: torch.stack([one[name] for one in effects]).mean(0) for name in effects[0]}
        return made | {"documents": self._documents(own)}

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
