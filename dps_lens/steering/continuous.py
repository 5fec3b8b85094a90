"""Continuous batching: requests join the batch and leave it between two steps, each as its own `generate` would be."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.errors import SteeringError
from dps_lens.model import HookedModel, in_use
from dps_lens.model.positions import is_long, rotary_switch
from dps_lens.steering.decoder import Decoder, Row
from dps_lens.steering.generation import Steps
from dps_lens.steering.plan import Plan


class Writing:
    """A request that is being written.

    Args:
        plan: of `plan_of`, with edits from the last prompt token on.
        keep_likeliest: keep so many likeliest tokens of every step.

    Attributes:
        plan: what was asked for.
        steps: what has been written.
        running: its texts that go on.
        error: why it ended before its time, if it did.
    """

    def __init__(self, plan: Plan, *, keep_likeliest: int = 0) -> None:
        if plan.positions != "response":
            raise SteeringError("a batch that others join edits heads in the response; use positions='response'")
        self.plan = plan
        self.steps: Steps = replace(plan.steps(), keep_likeliest=keep_likeliest)
        self.error: Exception | None = None
        self.running = list(range(plan.n_requests))
        self._mixer, self._choose = plan.mixer(), plan.chooser()
        self._order: Tensor

    @property
    def longest(self) -> int:
        """Positions of keys and values that its longest row may come to hold."""
        return max(len(row.tokens) for row in self.plan.rows) + self.plan.max_new_tokens

    def lay_out(self, rows: Sequence[Row], device: torch.device) -> None:
        """Note which rows there are of it, as they stand among each other."""
        self._mixer.lay_out(rows, self.running, device)
        self._order = torch.tensor([self.running.index(row.request) for row in rows], device=device)

    def write(self, logits: Tensor, early: Tensor) -> Int[Tensor, " row"]:
        """One token of each text from the logits of its rows; what each row goes on with."""
        full, steered = self._mixer(logits, early)
        chosen = self._choose(steered, self.running)
        written = self.steps.add(self.running, chosen, full, steered)
        token = chosen[self._order]
        most, ends = self.plan.max_new_tokens, self.plan.ends
        going = zip(self.running, written, strict=True)
        self.running = [text for text, one in going if one not in ends and self.steps.steps_of(text) < most]
        return token


@dataclass
class _Lane:
    """Rows that share passes.

    Attributes:
        decoder: of them.
        token: what each goes on with.
        owners: by number of a row's request, whose text it is and which.
        places: by writing, where its rows stand; laid out anew when rows come or go.
    """

    decoder: Decoder
    token: Int[Tensor, " row"]
    owners: dict[int, tuple[Writing, int]]
    places: dict[Writing, Int[Tensor, " row"]] = field(default_factory=dict)

    def fail(self, error: Exception) -> list[Writing]:
        """End all of its requests."""
        for writing in self.places:
            writing.error, writing.running = error, []
        return list(self.places)

    def lay_out(self) -> None:
        mine: dict[Writing, list[tuple[int, Row]]] = {}
        for place, row in enumerate(self.decoder.rows):
            writing, text = self.owners[row.request]
            mine.setdefault(writing, []).append((place, replace(row, request=text)))
        self.places = {}
        for writing, found in mine.items():
            self.places[writing] = torch.tensor([place for place, _ in found], device=self.decoder.device)
            writing.lay_out([row for _, row in found], self.decoder.device)


class ContinuousBatch:
    """Requests that are written at once, whatever their rules, heads, vectors, strengths and lengths.

    What a request writes is what `generate` writes for it alone, up to ties within rounding: rows never look at each
    other. Requests whose edits are of different kinds (heads scaled or vectors added, attention spread, heads patched,
    early layers read off), or that stand on both sides of a length at which rotary factors change, run in passes of
    their own.

    Args:
        model: a hooked model.
        chunk: positions of a prompt that are run between two steps of the others.
    """

    def __init__(self, model: HookedModel, *, chunk: int = 256) -> None:
        self.model, self._chunk = model, chunk
        # Keys of a piece would take the factors of the piece's length, not of the prompt's.
        self._piece = chunk if rotary_switch(model) is None else model.cfg.n_ctx
        self._waiting: list[tuple[Writing, Decoder, Iterator[int]]] = []
        self._lanes: dict[tuple[object, ...], _Lane] = {}
        self._numbers = count()

    def __len__(self) -> int:
        """Requests that are in it."""
        return len(self.writings)

    @property
    def writings(self) -> list[Writing]:
        """Requests that are in it: first those whose prompts are still to be run."""
        return [one for one, _, _ in self._waiting] + [one for lane in self._lanes.values() for one in lane.places]

    @property
    def rows(self) -> int:
        """Rows of the batch, those of prompts that are still to be run among them."""
        waiting = sum(len(decoder.rows) for _, decoder, _ in self._waiting)
        return waiting + sum(len(lane.decoder.rows) for lane in self._lanes.values())

    def add(self, writing: Writing) -> None:
        """Let a request join; its prompt is run in the next steps.

        Raises:
            SteeringError: it is to be compiled.
        """
        if writing.plan.config.compile:
            raise SteeringError("a compiled step has a batch of one size, which nothing can join; leave compile out")
        numbers = [next(self._numbers) for _ in range(writing.plan.n_requests)]
        rows = [replace(row, request=numbers[row.request]) for row in writing.plan.rows]
        decoder = replace(writing.plan, rows=rows).decoder()
        if not isinstance(decoder, Decoder):
            raise SteeringError(
                "its prompt and its negative prompt lie on both sides of a length at which the model's rotary factors "
                "change; shorten one"
            )
        self._waiting.append((writing, decoder, decoder.prefill_by(self._piece)))

    def leave(self, writing: Writing, texts: Sequence[int] | None = None) -> None:
        """End some texts of a request, or all of it."""
        writing.running = [one for one in writing.running if texts is not None and one not in texts]
        if not writing.running:
            self._waiting = [one for one in self._waiting if one[0] is not writing]
        self._sweep()

    def step(self) -> list[Writing]:
        """Run a chunk of the prompts that wait longest, and write a token of every text whose prompt has been run.

        Returns:
            the requests that got tokens, or an error.
        """
        with in_use(self.model):
            written, room = [], self._chunk
            while self._waiting and room > 0:
                # The last token of a prompt is run in a step of all.
                room -= min(self._piece, self._waiting[0][1].tokens.shape[1] - 1)
                written += self._advance()
            for key in list(self._lanes):
                written += self._step(self._lanes[key])
            self._sweep()
        return written

    def _advance(self) -> list[Writing]:
        """A piece of the prompt that waits longest, which joins when it is whole."""
        writing, decoder, pieces = self._waiting[0]
        try:
            if next(pieces):
                return []
        except Exception as error:
            writing.error = error
            self.leave(writing)
            return [writing]
        self._waiting.pop(0)
        plan = writing.plan
        long = is_long(self.model, len(decoder.rows[0].tokens) - 1)
        key = (str(plan.ablation.settings()), tuple(plan.early), long)
        texts = {row.request: (writing, own.request) for row, own in zip(decoder.rows, plan.rows, strict=True)}
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(decoder, decoder.tokens[:, -1], texts)
        else:
            try:
                lane.decoder.join(decoder)
            except Exception as error:  # some layers may have the new rows, and some not
                writing.error, writing.running = error, []
                del self._lanes[key]
                return [writing, *lane.fail(error)]
            lane.token = torch.cat([lane.token, decoder.tokens[:, -1]])
            lane.owners |= texts
        lane.lay_out()
        return []

    def _step(self, lane: _Lane) -> list[Writing]:
        try:
            with lane.decoder:
                logits, early = lane.decoder.step(lane.token)
        except Exception as error:
            return lane.fail(error)
        for writing, places in lane.places.items():
            try:
                lane.token[places] = writing.write(logits[places], early[:, places])
            except Exception as error:
                writing.error, writing.running = error, []
        return list(lane.places)

    def _sweep(self) -> None:
        """Let the rows of texts that have ended leave."""
        for key, lane in list(self._lanes.items()):
            stays = [
                text in writing.running for writing, text in (lane.owners[row.request] for row in lane.decoder.rows)
            ]
            if all(stays):
                continue
            if not any(stays):
                del self._lanes[key]
                continue
            before = {id(row): place for place, row in enumerate(lane.decoder.rows)}
            with lane.decoder:
                lane.decoder.keep(torch.tensor(stays))
            order = [before[id(row)] for row in lane.decoder.rows]
            lane.token = lane.token[torch.tensor(order, device=lane.token.device)]
            here = {row.request for row in lane.decoder.rows}
            lane.owners = {request: owner for request, owner in lane.owners.items() if request in here}
            lane.lay_out()
