"""Profile-retrieval heads: which heads look for the user's own documents while the user's text is written."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.checks import check_whole
from dps_lens.data import Example, Prompt, PromptConfig, User, build_prompt
from dps_lens.data.conditions import donors_of
from dps_lens.data.examples import by_key, choosing_examples, data_digest
from dps_lens.data.retrieval import retrieve
from dps_lens.data.tokenizer import PromptTokenizer
from dps_lens.errors import ScoreError
from dps_lens.families.work import FamilyWork
from dps_lens.model import HookedModel, Hooks, check_attention_reads, runner_of
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.work import Engine

NULL = "N/A"
_OWN, _OTHER = "own documents", "another user's documents"


@dataclass(frozen=True, eq=False)
class ProfileRetrieval:
    """Query-focused retrieval heads (QRHead, Zhang et al. 2025, arXiv 2506.09944), the query being the user's own text.

    The profile holds as many documents of another user as own ones, in a random order. A token's score is the
    attention that it gets from the positions whose logits give the response, mean over them, minus what it gets where
    the response is "N/A" (calibration). A document's score is the sum over its tokens, without those that lie over two
    standard deviations below the document's mean, as in the authors' code. A head's score is the sum over the own
    documents, mean over examples; the component `"another user's documents"` is what it is for the others, in the same
    prompt: the null.

    Attributes:
        users: whose newest discovery examples are read.
        items: documents of each side, at most: as many of each as both have.
        max_examples: the newest so many discovery examples of each user.
        prompt_config: how prompts are built, but for which documents are shown.
        seed: of the other user, and of the order.
    """

    name: ClassVar[str] = "profile_retrieval"
    unit: ClassVar[str] = "attention beyond a null response"

    users: Sequence[User]
    items: int = 3
    max_examples: int = 1
    prompt_config: PromptConfig = field(default_factory=PromptConfig)
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What decides the scores, for a manifest."""
        return {
            "data": data_digest(self.users, self.examples),
            "items": self.items,
            "max_examples": self.max_examples,
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
        """Scores `[example layer head]`.

        Raises:
            ScoreError: there is one user only.
        """
        check_whole(ScoreError, "profile_retrieval: items", self.items, least=1)
        if len(self.users) < 2:
            raise ScoreError("profile_retrieval: give at least two users; their documents stand in one profile")
        work, examples = FamilyWork(model, self), by_key(self.examples)
        found = work.run(
            list(examples), folder=folder, engine=engine, what=self.name, unit="example", progress=progress
        )
        made = [examples[key] for key in found]
        parts = {name: torch.stack([unit[name] for unit in found.values()]) for name in (_OWN, _OTHER)}
        return HeadScores(
            parts[_OWN],
            example_ids=[example.id for example in made],
            user_ids=[example.user_id for example in made],
            components=parts,
            manifest=work.left_out,
        )

    def measure(self, model: HookedModel, key: str, given: object = None) -> dict[str, Tensor]:
        """Scores of both sides in one example."""
        prompt = self.prompt(model, by_key(self.examples)[key])
        calibrated = mean_attention(model, prompt) - mean_attention(model, nulled(model, prompt))
        sides = {name: [span for shown, span in zip(prompt.shown, prompt.items, strict=True) if shown.startswith(name)]
                 for name in (_OWN, _OTHER)}  # fmt: skip
        return {
            name: torch.stack([document_score(calibrated[..., start:stop]) for start, stop in spans]).sum(0)
            for name, spans in sides.items()
        }

    def prompt(self, model: HookedModel, example: Example) -> Prompt:
        """The example's prompt with documents of both sides; their ids say whose they are."""
        (donor,) = donors_of(example, self.users, 1, self.seed)
        query, shown = example.task.query(example.input), []
        sides = {_OWN: example.showable, _OTHER: example.showable_of(donor)}
        items = min(self.items, *map(len, sides.values()))
        if not items:
            raise ScoreError(
                f"profile_retrieval: example {example.id!r} has no documents of its own, or user {donor.id!r} none "
                "that may stand beside them; leave one of the two users out"
            )
        for name, pool in sides.items():
            documents = retrieve(
                pool,
                query,
                items,
                task=example.task,
                method=self.prompt_config.retrieval,
                seed=self.seed,
                tokens=self.prompt_config.retrieval_tokens,
            )
            shown += [replace(document, id=f"{name} {place}") for place, document in enumerate(documents)]
        random.Random(f"{self.seed}|{example.user_id}|{example.id}").shuffle(shown)
        mixed = replace(example, profile=tuple(shown))
        config = replace(self.prompt_config, items=len(shown), retrieval="random", seed=self.seed)
        prompt = build_prompt(model, mixed, config=config)
        if len(prompt.shown) < len(shown):
            raise ScoreError(
                f"profile_retrieval: {len(prompt.shown)} of {len(shown)} documents fit into the profile of example "
                f"{example.id!r}; raise profile_tokens in PromptConfig, or lower items"
            )
        return prompt

    @cached_property
    def examples(self) -> list[Example]:
        """The discovery examples that are read, user by user."""
        return choosing_examples("profile_retrieval", self.users, "history", self.max_examples)


def nulled(model: HookedModel, prompt: Prompt) -> Prompt:
    """The same prompt with a response that says nothing."""
    start = prompt.spans["response"][0]
    answer = torch.tensor(PromptTokenizer(model).answer(NULL, None))
    spans = {**prompt.spans, "response": (start, start + len(answer))}
    return replace(prompt, tokens=torch.cat([prompt.tokens[:start], answer]), spans=spans)


@torch.inference_mode()
def mean_attention(model: HookedModel, prompt: Prompt) -> Float[Tensor, "layer head pos"]:
    """Attention to the prompt's positions, mean over those whose logits give the response.

    Raises:
        ModelCheckError: the attention that TransformerLens recomputes is not this model's own.
    """
    check_attention_reads("profile_retrieval", model)
    start, stop = prompt.spans["response"]
    found = torch.zeros(model.cfg.n_layers, model.cfg.n_heads, start)

    def keep(pattern: Tensor, hook: object, layer: int) -> None:
        found[layer] = pattern[0, :, start - 1 : stop - 1, :start].float().mean(1).cpu()

    layers, runner = range(model.cfg.n_layers), runner_of(model)
    with Hooks(model, [(f"blocks.{layer}.attn.hook_pattern", partial(keep, layer=layer)) for layer in layers]):
        runner.logits(prompt.tokens[None].to(runner.device), keep=1)
    return found


def document_score(tokens: Float[Tensor, "layer head pos"]) -> Float[Tensor, "layer head"]:
    """Sum over a document's tokens, without those far below their mean."""
    if tokens.shape[-1] < 2:
        return tokens.sum(-1)
    least = tokens.mean(-1, keepdim=True) - 2 * tokens.std(-1, keepdim=True)
    return (tokens * (tokens > least)).sum(-1)
