"""What heads look at from the response: the profile's documents, the task, the response itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data import Prompt, PromptConfig, User, build_prompt
from dps_lens.data.examples import held_out_examples
from dps_lens.errors import ScoreError
from dps_lens.heads import Head, HeadSet
from dps_lens.model import HookedModel, Hooks, check_attention_reads, runner_of
from dps_lens.progress import progress_bar
from dps_lens.result import Result
from dps_lens.work import RunConfig

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPattern(Result):
    """Attention of some heads over one prompt, from the positions whose logits give the response.

    Attributes:
        heads: of the first axis, in order.
        pattern: `Float[Tensor, "head query pos"]`, rows add up to 1; the first query is the last prompt token.
        pieces: text of each token of the prompt and its response.
        prompt: what was run; its spans tell profile, task and response apart.
        manifest: what was run, by its ids.
    """

    stem: ClassVar[str] = "attention"
    figure: ClassVar[str] = "attention"
    parts: ClassVar[tuple[type, ...]] = (Head, Prompt)

    heads: tuple[Head, ...]
    pattern: Float[Tensor, "head query pos"]
    pieces: tuple[str, ...]
    prompt: Prompt
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple(Head(*head) for head in self.heads))

    def summary(self) -> str:
        return f"{len(self.heads)} heads over {len(self.pieces)} tokens of example {self.prompt.example_id!r}"

    def to_frame(self) -> "pandas.DataFrame":
        """One row a head and token: `head`, `position`, `token` and the mean `attention` over the queries."""
        import pandas as pd

        rows = [
            {"head": str(head), "position": position, "token": piece, "attention": value}
            for head, values in zip(self.heads, self.mean.tolist(), strict=True)
            for position, (piece, value) in enumerate(zip(self.pieces, values, strict=True))
        ]
        return pd.DataFrame(rows)

    @property
    def mean(self) -> Float[Tensor, "head pos"]:
        """Mean over the queries."""
        return self.pattern.mean(1)


def attention_pattern(model: HookedModel, prompt: Prompt, heads: HeadSet) -> AttentionPattern:
    """Attention of heads over a prompt while its response is read.

    Args:
        model: a hooked model; its hooked attention runs.
        prompt: of `build_prompt`, with its response.
        heads: the heads to look at.

    Raises:
        HeadError: a head lies outside the model.
        ScoreError: the prompt has no response, or there are no heads.
    """
    heads.mask(model.cfg)
    start, stop = prompt.spans["response"]
    if stop <= start or not len(heads):
        raise ScoreError("attention_pattern: give a prompt with its response, and at least one head")
    patterns = _from_response(model, prompt, heads)
    pieces = tuple(model.tokenizer.decode([token]) for token in prompt.tokens.tolist())
    return AttentionPattern(tuple(heads), torch.stack([patterns[head] for head in heads]), pieces, prompt)


def profile_attention(
    model: HookedModel,
    users: Sequence[User],
    heads: HeadSet,
    *,
    max_examples: int | None = None,
    prompt_config: PromptConfig | None = None,
    run_config: RunConfig | None = None,
) -> "pandas.DataFrame":
    """Where heads attend from the positions that write the response, on evaluation examples.

    Args:
        model: a hooked model; its hooked attention runs.
        users: their evaluation examples are used.
        heads: the heads to look at.
        max_examples: the newest so many evaluation examples of each user.
        prompt_config: how prompts are built.
        run_config: progress bars.

    Returns:
        one row an example, head and target: `user`, `example`, `head`, `target`, `document`, `tokens`,
        `attention`. Targets are `item 1` … (with the id of the document, in the order of the prompt), `task`,
        `response`, `first token` and `other` (headings, chat marks). Attention is the mean over queries and adds
        up to 1 for every head and example.

    Raises:
        HeadError: a head lies outside the model.
    """
    import pandas as pd

    heads.mask(model.cfg)
    examples = held_out_examples("profile_attention", users, max_examples)
    rows = []
    shown = (run_config or RunConfig()).progress
    for example in progress_bar(examples, desc="attention", unit="example", shown=shown):
        built = build_prompt(model, example, config=prompt_config)
        targets = targets_of(built)
        for head, pattern in _from_response(model, built, heads).items():
            attention = pattern.mean(0)
            for name, (document, positions) in targets.items():
                rows.append(
                    {
                        "user": example.user_id,
                        "example": example.id,
                        "head": str(head),
                        "target": name,
                        "document": document,
                        "tokens": int(positions.sum()),
                        "attention": float(attention[positions].sum()),
                    }
                )
    return pd.DataFrame(rows)


@torch.inference_mode()
def _from_response(model: HookedModel, prompt: Prompt, heads: HeadSet) -> dict[Head, Float[Tensor, "query pos"]]:
    """Attention to every position, from the queries whose logits give the response."""
    check_attention_reads("attention", model)
    start, stop = prompt.spans["response"]
    patterns: dict[Head, Tensor] = {}

    def keep(pattern: Tensor, hook: object, layer: int) -> None:
        for head in heads:
            if head.layer == layer:
                patterns[head] = pattern[0, head.head, start - 1 : stop - 1].float().cpu()

    layers = sorted({head.layer for head in heads})
    hooks = [(f"blocks.{layer}.attn.hook_pattern", partial(keep, layer=layer)) for layer in layers]
    runner = runner_of(model)
    with Hooks(model, hooks):
        runner.logits(prompt.tokens[None].to(runner.device), keep=1)
    return {head: patterns[head] for head in heads}


def targets_of(prompt: Prompt) -> dict[str, tuple[str, Tensor]]:
    """Positions by what stands there; every position belongs to one target."""
    free = torch.ones(len(prompt.tokens), dtype=torch.bool)
    targets: dict[str, tuple[str, Tensor]] = {}

    def claim(name: str, document: str, start: int, stop: int) -> None:
        inside = torch.zeros_like(free)
        inside[start:stop] = True
        targets[name] = (document, inside & free)
        free[start:stop] = False

    claim("first token", "", 0, 1)
    for number, (document, (start, stop)) in enumerate(zip(prompt.shown, prompt.items, strict=True), start=1):
        claim(f"item {number}", document, start, stop)
    for name in ("task", "response"):
        claim(name, "", *prompt.spans[name])
    targets["other"] = ("", free.clone())
    return targets
