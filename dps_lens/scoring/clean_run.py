"""A prompt's clean run, kept so that ablated runs restart in the middle of it.

An ablation first changes the residual stream in its own layer, so an ablated run enters there with the
clean residual. Rows of one batch carry different head sets and join at the layer where each first
differs; layers below are never recomputed. With `positions="response"` all of them share the keys
and values of the prompt.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.errors import ScoreError
from dps_lens.heads import Head
from dps_lens.intervene import (
    Ablation,
    AblationLike,
    Context,
    Edit,
    Editing,
    Gate,
    Patch,
    Replacement,
    Where,
    attention_for,
    everywhere,
    find_ablation,
    recording_z,
    window,
)
from dps_lens.literals import Positions
from dps_lens.model import PromptCache, Residuals, Runner, reused_logits
from dps_lens.model.losses import token_losses
from dps_lens.model.positions import check_switch
from dps_lens.scoring.objectives import NLL, Objective, losses_of_rows
from dps_lens.work import BatchSize

_CPU_TOKENS, _GPU_TOKENS = 512, 16384
_RESIDUAL_BYTES = 4 * 2**30


class CleanRun:
    """The unablated run of one prompt, and what ablations of it change.

    Args:
        runner: of the model.
        prompt: with its response.
        ablation: what is done to heads; decides which attention runs.
        positions: where it is done.
        objective: what is measured.
        context: where the ablation finds its values; without one it must bring them.
        where: edit fewer positions than `positions` says.
        keep_z: keep the z of every head at the response positions.
        batch_size: rows of a batch; `"auto"` fills about 512 tokens on a CPU, up to 16,384 on a GPU, as memory
            allows.
        prompt_cache: of a run of the same prompt with another response.

    Attributes:
        losses: `Float64[Tensor, "pos"]`, the objective at each response position.
        value: their mean.
        nll: of the response, nats per token.
        z: `Float[Tensor, "layer pos head d_head"]` over the positions that are run, where it was asked for.
    """

    def __init__(
        self,
        runner: Runner,
        prompt: Prompt,
        *,
        ablation: AblationLike = "zero",
        positions: Positions = "response",
        objective: Objective | None = None,
        context: Context | None = None,
        where: Where | None = None,
        keep_z: bool = False,
        batch_size: BatchSize = "auto",
        prompt_cache: PromptCache | None = None,
    ) -> None:
        self.runner, self.prompt, self.positions = runner, prompt, positions
        self.ablation, self.objective = find_ablation(ablation), objective or NLL()
        start, stop = prompt.spans["response"]
        if stop <= start:
            raise ScoreError(f"example {prompt.example_id!r}: the prompt has no response to score")
        tokens = prompt.tokens[None].to(runner.device)
        self.targets = tokens[0, start:stop]
        # The last response token is never an input of what is read.
        self.begin = start - 1 if positions == "response" else 0
        check_switch(runner.model, f"example {prompt.example_id!r}", self.begin or stop - 1, stop - 1)
        self.tokens = tokens[:, self.begin : stop - 1]
        self.where: Where = where or (everywhere if positions in ("response", "all") else window(prompt, positions))
        self.prompt_cache = prompt_cache
        self.residuals: Residuals = dict.fromkeys(range(0, runner.cfg.n_layers, self._spacing()))
        with ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
            stack.enter_context(attention_for(runner.model, self.ablation))
            if self.begin and prompt_cache is None:
                self.prompt_cache = runner.prefill(tokens[:, : self.begin])
            recording = stack.enter_context(recording_z(runner.model)) if keep_z else {}
            logits = runner.logits(self.tokens, prompt=self.prompt_cache, keep=len(self.targets), record=self.residuals)
        self.z = torch.stack([recording[layer][0].to(runner.device) for layer in sorted(recording)]) if keep_z else None
        self.logits = logits[0]
        self.losses = self.measured(logits)[0]
        self.value = float(self.losses.mean())
        is_nll = isinstance(self.objective, NLL)
        self.nll = self.value if is_nll else float(token_losses(self.logits, self.targets).double().mean())
        self.batch_size = self._rows_per_batch(batch_size)
        if not math.isfinite(self.nll):
            raise ScoreError(
                f"example {prompt.example_id!r}: the model's NLL is {self.nll}; check_model(model) looks for NaN in "
                "the weights"
            )
        self.values: Tensor | None = None
        if context is None:
            self.values = self.ablation.standalone("CleanRun", decoding=False)
        elif self.where(self.tokens.shape[1]) is not None:
            self.values = self.ablation.values_for(prompt, context)

    def with_values(self, ablation: Ablation, where: Where | None = None) -> "CleanRun":
        """The same run, to be ablated otherwise by what brings its own values; nothing is run again.

        Raises:
            InterventionError: the ablation needs examples.
        """
        if ablation.site != self.ablation.site:
            raise ScoreError(f"a clean run for {self.ablation.name!r} serves no {ablation.name!r}; make another one")
        other = copy(self)
        other.ablation, other.where = ablation, where or self.where
        other.values = ablation.standalone("CleanRun", decoding=False)
        return other

    def patched_from(self, source: "CleanRun", patch: Patch) -> "CleanRun":
        """The same run, to be patched with the z that was kept of another run of the same response."""
        return self.with_values(replace(patch, z=source.z))

    @property
    def idle(self) -> bool:
        """No position is edited."""
        return self.where(self.tokens.shape[1]) is None

    def measured(self, logits: Float[Tensor, "row pos d_vocab"]) -> Float64[Tensor, "row pos"]:
        """The objective at each response position, of logits of this response."""
        return losses_of_rows(self.objective, logits, self.targets, self.logits)

    def _rows_per_batch(self, batch_size: BatchSize) -> int:
        if batch_size == "auto":
            n_tokens = self.tokens.shape[1]
            if self.runner.device.type != "cuda":
                return max(1, _CPU_TOKENS // n_tokens)
            free, _ = torch.cuda.mem_get_info(self.runner.device)
            free += torch.cuda.memory_reserved(self.runner.device) - torch.cuda.memory_allocated(self.runner.device)
            return max(1, min(_GPU_TOKENS // n_tokens, int(0.5 * free / self._bytes_per_row())))
        if batch_size < 1:
            raise ScoreError(f"batch_size {batch_size!r} is not a positive number or 'auto'")
        return batch_size

    def _bytes_per_row(self) -> int:
        """A generous guess at what a row of a batch holds: float32 logits twice, activations, prompt keys."""
        cfg = self.runner.cfg
        cached = self.prompt_cache.layers[0] if self.prompt_cache else ()
        prompt = 4 * sum(tensor.numel() * tensor.element_size() for tensor in cached)
        return 8 * len(self.targets) * cfg.d_vocab + 64 * self.tokens.shape[1] * cfg.d_model + prompt

    def _spacing(self) -> int:
        """Keep the residuals of every so many layers: all of them where they fit the bound."""
        cfg = self.runner.cfg
        held = cfg.n_layers * self.tokens.shape[1] * cfg.d_model * 4
        return min(cfg.n_layers, math.ceil(held / _RESIDUAL_BYTES))

    @torch.no_grad()
    def residual(self, layer: int) -> Float[Tensor, "1 pos d_model"]:
        """The clean residual stream entering a layer, computed from the nearest one that is kept."""
        kept = max(one for one in self.residuals if one <= layer)
        residual = self.residuals[kept]
        for between in range(kept, layer):
            residual = self.runner.block(between, residual, self.tokens, prompt=self.prompt_cache)
        return residual

    def ablated(self, masks: Bool[Tensor, "row layer head"]) -> Float64[Tensor, " row"]:
        """Mean of the objective over the response with the heads of each row ablated."""
        return self.ablated_losses(masks).mean(-1)

    @torch.inference_mode()
    def ablated_losses(self, masks: Bool[Tensor, "row layer head"]) -> Float64[Tensor, "row pos"]:
        """The objective at each response position with the heads of each row ablated; a row without heads is clean."""
        if self.idle:
            return self.losses.repeat(len(masks), 1)
        used = masks.any(-1)
        first = torch.where(used.any(-1), used.int().argmax(-1), -1).tolist()
        return self._batched(first, lambda rows: self.edit(masks[rows]))

    def gated(self, gates: Float[Tensor, "row layer head"]) -> Float[Tensor, " row"]:
        """Mean of the objective over the response with the heads of each row let through by its gates.

        A gate of 1 leaves a head as it is, one of 0 ablates it; gradients flow to the gates, inside `gradients_of`.
        """
        return self.gated_losses(gates).mean(-1)

    def gated_losses(self, gates: Float[Tensor, "row layer head"]) -> Float[Tensor, "row pos"]:
        """The objective at each response position, as `gated`."""
        with Gate(gates, self.ablation, self.where, self.values).on(self.runner.model):
            logits = self.runner.logits(
                self.tokens.expand(len(gates), -1), prompt=self.prompt_cache, keep=len(self.targets)
            )
        return self.measured(logits)

    def edit(self, masks: Bool[Tensor, "row layer head"]) -> Editing:
        """What ablates the heads of each row, where rows join by layer."""
        return Edit(masks, self.ablation, self.where, self.values, rows_join=True)

    @torch.inference_mode()
    def replaced_losses(self, heads: Sequence[Head], z: Float[Tensor, "row pos d_head"]) -> Float64[Tensor, "row pos"]:
        """The objective at each response position with the z of one head a row, another in each, at all positions that
        are run."""
        return self._batched(
            [head.layer for head in heads], lambda rows: Replacement([heads[row] for row in rows], z[rows])
        )

    def _batched(self, first: Sequence[int], edit: Callable[[list[int]], Editing]) -> Tensor:
        """Losses of edited rows, which enter at their first edited layer; −1 is a row that stays clean."""
        losses = self.losses.repeat(len(first), 1)
        order = sorted((row for row, layer in enumerate(first) if layer >= 0), key=lambda row: first[row])
        with ExitStack() as stack:
            stack.enter_context(attention_for(self.runner.model, self.ablation))
            stack.enter_context(reused_logits(self.runner.model))
            while order:
                rows = order[: self.batch_size]
                try:
                    losses[rows] = self._run([first[row] for row in rows], edit(rows))
                except torch.OutOfMemoryError:
                    if len(rows) == 1:
                        raise
                    self.batch_size = len(rows) // 2
                    torch.cuda.empty_cache()
                    continue
                order = order[len(rows) :]
        if not bool(torch.isfinite(losses).all()):
            raise ScoreError(
                f"example {self.prompt.example_id!r}: with heads ablated, the objective is NaN or infinite; load the "
                "model in float32 or bfloat16, or let check_model(model) look for NaN in the weights"
            )
        return losses

    def _run(self, first: Sequence[int], edit: Editing) -> Tensor:
        starts = {layer: self.residual(layer).expand(first.count(layer), -1, -1) for layer in dict.fromkeys(first)}
        with edit.on(self.runner.model):
            logits = self.runner.resume(starts, self.tokens, prompt=self.prompt_cache, keep=len(self.targets))
        return self.measured(logits)


def single_heads(n_layers: int, n_heads: int) -> Bool[Tensor, "row layer head"]:
    """One row for each head, by layer, then head."""
    return torch.eye(n_layers * n_heads, dtype=torch.bool).reshape(-1, n_layers, n_heads)
