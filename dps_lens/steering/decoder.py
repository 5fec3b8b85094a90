"""Branches decoded as rows of one batch, each with its own prompt and its own heads edited."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dps_lens.intervene import (
    Ablation,
    Edit,
    FromRow,
    Patch,
    Scale,
    Selection,
    Where,
    Zero,
    attention_for,
    everywhere,
)
from dps_lens.literals import Positions
from dps_lens.model import BypassedHooks, HookedModel, Hooks, Residuals, runner_of
from dps_lens.model.runner import PromptCache, recorders
from dps_lens.steering.terms import Branch


@dataclass(frozen=True)
class Row:
    """One row of the batch: a branch of a request.

    Attributes:
        request: the prompt that it belongs to.
        branch: what runs in it.
        tokens: ids that it starts from.
        profile: where the profile stands in them, `(start, stop)`.
        factors: `Float[Tensor, "layer head"]`, what z of each head is multiplied by; 1 changes nothing. Ablations other
            than zero act on the heads whose factor is 0.
        added: by hook, what is added to every position there from the last prompt token on.
    """

    request: int
    branch: Branch
    tokens: Int[Tensor, " pos"]
    profile: tuple[int, int]
    factors: Float[Tensor, "layer head"]
    added: Mapping[str, Tensor] = field(default_factory=dict)


class Decoder:
    """Decodes branches step by step; a context, inside which the heads are edited.

    Outside the context the model is bare. It can be entered again and again, also inside itself: once around all
    steps, or, where others use the model in between, around each. With `positions="response"` equal prompts are run
    once, whatever their branches. Rows are left-padded. Hooks of others act if they are on the model when the context
    is entered. Rows of another decoder may join.

    Attributes:
        rows: those that still run.
        tokens: `Int[Tensor, "row pos"]`, the prompts that it began with.
        mask: 1 where a position that is cached is a token, 0 where it is padding.
        device: where ids of tokens go in.
    """

    def __init__(
        self,
        model: HookedModel,
        rows: Sequence[Row],
        *,
        ablation: Ablation,
        positions: Positions = "response",
        early: Sequence[int] = (),
        room: int = 64,
    ) -> None:
        """Lay out the batch.

        Args:
            model: a hooked model.
            rows: of the batch.
            ablation: of the edited branch.
            positions: where heads are edited.
            early: layers whose entering residual stream also goes straight to the final norm and unembedding.
            room: tokens that will be written.
        """
        self.model, self.runner = model, runner_of(model)
        self.ablation, self.positions, self._room = ablation, positions, room
        self._values = None if isinstance(ablation, Patch) else ablation.standalone("generate")
        self._early: Residuals = dict.fromkeys(early)
        self.rows = list(rows)
        self.device = device = self.runner.device
        longest = max(len(row.tokens) for row in rows)
        pad = model.tokenizer.pad_token_id or 0
        self._gaps = gaps = [longest - len(row.tokens) for row in rows]
        padded = [torch.nn.functional.pad(row.tokens, (gap, 0), value=pad) for row, gap in zip(rows, gaps, strict=True)]
        self.tokens = torch.stack(padded).to(device)
        self.mask = torch.stack([(torch.arange(longest - 1) >= gap).long() for gap in gaps]).to(device)
        self.factors = torch.stack([row.factors for row in rows]).to(device)
        self._added = _by_hook(rows, device)
        self._profile = torch.zeros(len(rows), longest - 1, dtype=torch.bool)
        for index, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
            self._profile[index, gap + row.profile[0] : gap + row.profile[1]] = True
        self._cache: Any = None
        self._hooks: Hooks | None = None
        self._lean: BypassedHooks
        self._entered, self._attention, self._on = 0, ExitStack(), ExitStack()

    def __enter__(self) -> "Decoder":
        self._entered += 1
        if self._entered == 1:
            try:
                self._attach()
            except BaseException:
                self.__exit__(None, None, None)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            self._on.close()
            self._attention.close()

    @torch.inference_mode()
    def _attach(self) -> None:
        self._attention.enter_context(attention_for(self.model, self.ablation))
        if self._cache is None:
            self._cache = self._prefill()
        if self._hooks is None:
            self._install()
            return
        self._on.enter_context(self._hooks)
        if not self._lean.is_current():
            self._lean = BypassedHooks(self.model)

    def _install(self) -> None:
        """Hooks for the rows that run; on the layers only where a head of some row is edited."""
        self._on.close()
        hooks = [] if self.positions == "profile" else self._edit(everywhere).hooks(self.model)
        self._hooks = Hooks(self.model, [*hooks, *adding(self._added), *recorders(self._early)])
        self._on.enter_context(self._hooks)
        self._lean = BypassedHooks(self.model)

    def _edit(self, where: Where) -> Scale | Edit | FromRow:
        if isinstance(self.ablation, Patch):
            return FromRow(self.factors == 0, self._negatives())
        # Zero is a factor of 0, and so can be done in part.
        if isinstance(self.ablation, Zero):
            return Scale(self.factors, where)
        return Edit(self.factors == 0, self.ablation, where, self._values)

    def _negatives(self) -> Int[Tensor, " row"]:
        """For each row, the one that runs its request's negative prompt; itself where heads are left alone."""
        place = {row.request: index for index, row in enumerate(self.rows) if row.branch == "negative"}
        source = [place[row.request] if row.branch == "ablated" else index for index, row in enumerate(self.rows)]
        return torch.tensor(source, device=self.device)

    def _prefill(self) -> Any:
        """Everything before the last prompt token: once a prompt, or once a branch where branches differ there."""
        if self.positions == "response":
            first, same = self._distinct()
            with BypassedHooks(self.model):
                prompt = self.runner.prefill(self.tokens[first, :-1], self.mask[first])
            return self._start(prompt, same)

        def profile(n_pos: int) -> Selection:
            return self._profile

        with (
            self._edit(profile if self.positions == "profile" else everywhere).on(self.model),
            BypassedHooks(self.model),
        ):
            prompt = self.runner.prefill(self.tokens[:, :-1], self.mask)
        return self._start(prompt, torch.arange(len(self.tokens), device=self.tokens.device))

    def _distinct(self) -> tuple[Int[Tensor, " prompt"], Int[Tensor, " row"]]:
        """One row of each prompt, and for each row, which prompt it has."""
        _, same = torch.cat([self.tokens, self.mask], dim=1).unique(dim=0, return_inverse=True)
        return torch.stack([(same == index).nonzero()[0, 0] for index in range(int(same.max()) + 1)]), same

    @torch.inference_mode()
    def prefill_by(self, chunk: int) -> Iterator[int]:
        """Run the prompts `chunk` positions at a time; yields how many positions are left after each; outside the
        context, and before it is entered. Only where heads are edited in the response, which leaves prompts bare."""
        first, same = self._distinct()
        tokens, mask, prompt = self.tokens[first, :-1], self.mask[first], None
        total = tokens.shape[1]
        for start in range(0, total, chunk):
            stop = min(start + chunk, total)
            with attention_for(self.model, self.ablation), BypassedHooks(self.model):
                prompt = self.runner.prefill(tokens[:, start:stop], mask[:, :stop], after=prompt)
            if stop == total:
                self._cache = self._start(prompt, same)
            yield total - stop

    def _start(self, prompt: PromptCache, rows: Int[Tensor, " row"]) -> Any:
        """A growing cache whose row i continues row `rows[i]` of the prompts."""
        return self.runner.start_decoding(prompt, rows, self._room)

    @torch.inference_mode()
    def step(
        self, tokens: Int[Tensor, " row"] | None = None
    ) -> tuple[Float[Tensor, "row d_vocab"], Float[Tensor, "layer row d_vocab"]]:
        """Logits after one more token a row, and those read off early layers; inside the context.

        Args:
            tokens: the tokens; None runs the last token of the prompts.
        """
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        column = self.tokens[:, -1:] if tokens is None else tokens[:, None]
        with self._lean:
            logits = self.runner.step(column, self._cache, self.mask if any(self._gaps) else None).float()
        return logits, self._read_early(logits, column)

    def _read_early(
        self, logits: Float[Tensor, "row d_vocab"], column: Int[Tensor, "row 1"]
    ) -> Float[Tensor, "layer row d_vocab"]:
        """Logits read off the early layers at this step."""
        if not self._early:
            return logits.new_empty(0, *logits.shape)
        stacked = torch.cat(list(self._early.values()))
        read = self.runner.resume({self.runner.cfg.n_layers: stacked}, column[:1])
        return read.float().reshape(len(self._early), *logits.shape)

    @torch.inference_mode()
    def keep(self, rows: Bool[Tensor, " row"]) -> None:
        """Let the other rows leave the batch; inside the context. Those behind may take their places."""
        order = _filled_up(rows.tolist())
        index = torch.tensor(order, device=self.mask.device)
        self.rows, gaps = [self.rows[row] for row in order], [self._gaps[row] for row in order]
        self.mask, self.factors = self.mask[index], self.factors[index]
        left = {name: values[index] for name, values in self._added.items()}
        self._added = {name: values for name, values in left.items() if values.any()}
        self.runner.select(self._cache, torch.tensor(order))
        if (least := min(gaps)) > 0:
            # The longest row has left: nobody needs the first positions any more.
            self.runner.trim(self._cache, least)
            self.mask, gaps = self.mask[:, least:], [gap - least for gap in gaps]
        self._gaps = gaps
        self._install()

    @torch.inference_mode()
    def join(self, other: "Decoder") -> None:
        """Take the rows of another decoder in, behind those that are here, which end at the same position; outside the
        context. Its prompts have been run, its edits are of the same kind, and its requests have other numbers."""
        self.runner.join(self._cache, other._cache)
        masks, gaps = (self.mask, other.mask), (self._gaps, other._gaps)
        longest = max(mask.shape[1] for mask in masks)
        self._gaps = [gap + longest - mask.shape[1] for mask, own in zip(masks, gaps, strict=True) for gap in own]
        self.mask = torch.cat([torch.nn.functional.pad(mask, (longest - mask.shape[1], 0)) for mask in masks])
        self.rows += other.rows
        self.factors = torch.cat([self.factors, other.factors])
        self._added = _by_hook(self.rows, self.device)
        self._hooks = None


def _filled_up(stays: Sequence[bool]) -> list[int]:
    """Places of rows that stay, in an order that moves few: the last ones take the places of those that leave.

    >>> _filled_up([True, False, True, True])
    [0, 3, 2]
    """
    staying = [row for row, stay in enumerate(stays) if stay]
    order, behind = list(range(len(staying))), [row for row in staying if row >= len(staying)]
    for place in order:
        if not stays[place]:
            order[place] = behind.pop()
    return order


def _by_hook(rows: Sequence[Row], device: torch.device) -> dict[str, Float[Tensor, "row ..."]]:
    """What all rows add, by hook; 0 where a row adds nothing there."""
    added: dict[str, Tensor] = {}
    for index, row in enumerate(rows):
        for name, values in row.added.items():
            added.setdefault(name, torch.zeros(len(rows), *values.shape, device=device))[index] = values.to(device)
    return added


def adding(added: Mapping[str, Float[Tensor, "row ..."]]) -> list[tuple[str, Any]]:
    """Hooks that add to every position of each row."""

    def add(activation: Tensor, hook: object, values: Tensor) -> Tensor:
        return activation + values[:, None].to(activation)

    return [(name, partial(add, values=values)) for name, values in added.items()]
