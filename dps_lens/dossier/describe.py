"""What one head does for users: what it reads, what it writes, for which tokens; beside other heads of its layer."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.data import Prompt, PromptConfig, User, build_prompt
from dps_lens.dossier.circuits import output_circuits, readers
from dps_lens.dossier.measures import MEASURES, Look, attributed, looked_at, per_token, stacked
from dps_lens.dossier.result import Dossier
from dps_lens.dossier.words import WordKinds
from dps_lens.errors import ScoreError
from dps_lens.families.profile import nulled
from dps_lens.heads import Head, HeadSet
from dps_lens.literals import Against
from dps_lens.model import HookedModel, check_attention_reads, has_weights, runner_of
from dps_lens.model.final_norm import FinalNorm
from dps_lens.paths.direct import DirectPaths, Glance
from dps_lens.paths.pairs import PairWork
from dps_lens.scores import HeadScores
from dps_lens.selection import random_beside
from dps_lens.stats.intervals import user_means
from dps_lens.work import Engine, Run, RunConfig

_CALL = "describe_head"
_TOKENS = 10
_PART_OF_CHARACTER = "\ufffd"


def describe_head(
    model: HookedModel,
    users: Sequence[User],
    head: Head | str,
    *,
    families: Mapping[str, HeadScores] | None = None,
    against: Against = "other_user",
    n_random: int = 4,
    max_examples: int | None = 1,
    prompt_config: PromptConfig | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    engine: Engine | None = None,
    run_config: RunConfig | None = None,
) -> Dossier:
    """What a head reads, what it writes, and which tokens need it, on the users' evaluation examples.

    | section | measures |
    |---|---|
    | reads | share of attention from the response: by place in the prompt, and by what stands there |
    | reads, otherwise | attention to the profile beyond that of a null response, as QRHead calibrates (arXiv 2506.09944); to another user's profile (NaN for `"no_profile"`); to the own one with its tokens shuffled |
    | writes | direct logit attribution, before what the model makes of its logits (a scale, a cap): to the own text, own z minus the other run's; to the tokens it attends to; then the NLL that the head's own write brings past all other layers, and that with all that follows |
    | per token | what copied tokens, and each kind of word, have of the last |
    | weights | whether `W_V W_O` copies, how many directions it writes to |

    Args:
        model: a hooked model; attention is read from what TransformerLens recomputes.
        users: their evaluation examples are used.
        head: such as `"L14H3"`.
        families: scores of other kinds of heads, such as `reference_heads(model)`: the head's rank in each.
        against: the other run: with another user's profile, or without one.
        n_random: random other heads of the same layer, measured beside it.
        max_examples: the newest so many evaluation examples of each user.
        prompt_config: how prompts are built.
        seed: of donors, random heads and shuffled words.
        out: a run folder; a run that is started again there resumes.
        engine: as in `score_heads`.
        run_config: force, rows of a batch, progress bars.

    Raises:
        HeadError: the head lies outside the model.
        ScoreError: the settings do not fit together.
        ModelCheckError: the architecture's attention cannot be read.
        RunError: `out` holds a run with other settings.
    """  # noqa: E501
    run = Run(model, Dossier, out, engine, run_config)
    work = DossierWork(
        model=model,
        users=list(users),
        head=Head.parse(head) if isinstance(head, str) else Head(*head),
        against=against,
        n_random=n_random,
        max_examples=max_examples,
        prompt_config=prompt_config or PromptConfig(),
        seed=seed,
        batch_size=run.config.batch_size,
    )
    run.open(work.fingerprint)
    return run.keep(work.run(run, families or {}))


@dataclass(kw_only=True)
class DossierWork(PairWork):
    """The run of `describe_head`."""

    call: ClassVar[str] = _CALL

    head: Head
    n_random: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(ScoreError, f"{_CALL}: n_random", self.n_random, least=0)
        HeadSet([self.head]).mask(self.model.cfg)
        if not has_weights(self.model):
            raise ScoreError(f"{_CALL}: the head's weights are read here, and this model was loaded without any")
        check_attention_reads(_CALL, self.model)

    @cached_property
    def controls(self) -> HeadSet:
        """Random other heads of the layer."""
        return random_beside(self.model, self.head, self.n_random, seed=self.seed)

    @property
    def heads(self) -> tuple[Head, ...]:
        return (self.head, *self.controls)

    @cached_property
    def kinds(self) -> WordKinds:
        return WordKinds(self.users)

    def fingerprint(self) -> dict[str, Any]:
        about = {"head": str(self.head), "n_random": self.n_random, "measures": list(MEASURES)}
        return super().fingerprint() | about

    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """`values` [head measure], `change` [pos] of the head itself, and, own minus other, `z` [head d_head] and what
        the head adds to the residual stream, `write` [d_model]."""
        layer = self.head.layer
        prompt, (asked,) = self.prompts(self.by_key[key])
        own, other = DirectPaths(self.clean_run(prompt)), self._glance(asked)
        assert own.run.z is not None
        look = Look.of(prompt, own.pattern(layer), self.heads)
        norm, w_u = FinalNorm(self.model, own.final[0]), self.model.W_U.detach().float()
        written = own.writes(self.heads, {layer: other.z})
        # From nothing: the whole write of a head, not its difference.
        whole = -own.writes(self.heads, {layer: torch.zeros_like(other.z)})
        chosen = [head.head for head in self.heads]
        change = own.run.replaced_losses(self.heads, other.z[:, chosen].transpose(0, 1)) - own.run.losses
        found = {
            **look.reads(self.model),
            "profile, beyond a null response": look.profile - self._profile(nulled(self.model, prompt)),
            "another user's profile": self._elsewhere(asked, other),
            "profile, words shuffled": self._profile(self._shuffled(prompt)),
            "own text": attributed(-written, norm, w_u, own.run.targets).mean(-1),
            "what it looks at": looked_at(look, whole, norm, w_u),
            "directly": own.to_logits(written).mean(-1) - own.run.value,
            "patched": change.mean(-1),
            **per_token(change, prompt, pieces_of(self.model, prompt), self.kinds),
        }
        z = (own.run.z[layer] - other.z)[:, chosen].mean(0)
        return {
            "values": stacked(found),
            "change": change[0],
            "z": z.float().cpu(),
            "write": -written[0].mean(0).float().cpu(),
        }

    def _elsewhere(self, asked: Prompt, other: Glance) -> Tensor:
        """Attention to the profile of the other run; NaN where it shows none."""
        if self.against == "no_profile":
            return torch.full((len(self.heads),), torch.nan)
        return Look.of(asked, other.pattern, self.heads).profile

    def _profile(self, prompt: Prompt) -> Tensor:
        """Attention to the profile of a prompt."""
        return Look.of(prompt, self._glance(prompt).pattern, self.heads).profile

    def _glance(self, prompt: Prompt) -> Glance:
        return Glance.of(runner_of(self.model), prompt, self.head.layer)

    def _shuffled(self, prompt: Prompt) -> Prompt:
        """The same prompt with the tokens of its profile in a random order."""
        start, stop = prompt.spans["profile"]
        tokens = prompt.tokens.clone()
        order = random.Random(f"{self.seed}|{prompt.user_id}|{prompt.example_id}").sample(
            range(stop - start), stop - start
        )
        tokens[start:stop] = tokens[start:stop][order]
        return replace(prompt, tokens=tokens)

    def run(self, run: Run, families: Mapping[str, HeadScores]) -> Dossier:
        """Measure every example; finished ones are read from the run's folder."""
        units = run.units(self, list(self.by_key), "describing a head").made
        examples, made = [self.by_key[key] for key in units], list(units.values())
        prompts = [build_prompt(self.model, example, config=self.prompt_config) for example in examples]
        circuits = output_circuits(self.model, self.heads)
        z = torch.stack([unit["z"] for unit in made])
        owners = tuple(example.user_id for example in examples)
        write = user_means(torch.stack([unit["write"] for unit in made]).double(), owners).mean(0)
        up, down = self._lens(torch.from_numpy(write).float())
        return Dossier(
            self.head,
            self.controls,
            owners,
            tuple(example.id for example in examples),
            torch.stack([unit["values"] for unit in made]),
            z,
            tuple(pieces_of(self.model, prompt) for prompt in prompts),
            tuple(tuple(unit["change"].tolist()) for unit in made),
            weights={
                "copying eigenvalues": tuple(one.copying for one in circuits),
                "directions written to": tuple(one.dimensions for one in circuits),
            },
            spectrum=torch.stack([one.spectrum for one in circuits]),
            readers=tuple((str(one.head), one.into, one.overlap) for one in readers(self.model, self.head)),
            raised=up,
            lowered=down,
            ranks=ranks_of(self.head, families),
            manifest=run.manifest,
        )

    @torch.inference_mode()
    def _lens(self, write: Float[Tensor, " d_model"]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Tokens whose logits a direction of the residual stream raises and lowers most."""
        direction = write[None].to(runner_of(self.model).device)
        logits = (FinalNorm(self.model, direction)(direction) @ self.model.W_U.detach().float())[0]
        order = logits.argsort(descending=True).tolist()

        def words(tokens: list[int]) -> tuple[str, ...]:
            return tuple(self.model.tokenizer.decode([token]) for token in tokens)

        return words(order[:_TOKENS]), words(order[::-1][:_TOKENS])


def pieces_of(model: HookedModel, prompt: Prompt) -> tuple[str, ...]:
    """The response's tokens as text, each as it reads behind the others; a character of several is the last one's."""
    ids = prompt.response_tokens.tolist()
    texts = [model.tokenizer.decode(ids[:stop]) for stop in range(len(ids) + 1)]
    whole = [text.rstrip(_PART_OF_CHARACTER) for text in texts[:-1]] + texts[-1:]
    return tuple(after[len(before) :] for before, after in pairwise(whole))


def ranks_of(head: Head, families: Mapping[str, HeadScores]) -> dict[str, dict[str, float]]:
    """The head's score and rank in each family that is defined, and how many heads there are."""
    found = {}
    for name, scores in families.items():
        if scores.defined:
            mean = scores.mean()
            found[name] = {
                "score": float(mean[head]),
                "rank": int((mean > mean[head]).sum()) + 1,
                "heads": mean.numel(),
                "median": float(mean.median()),
            }
    return found
