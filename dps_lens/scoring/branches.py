"""A prompt's clean pass, kept so that ablated branches restart in the middle of it.

An ablation first changes the residual stream in its own layer, so a branch enters there with the
clean residual. Rows of one batch carry different head sets and join at the layer where each first
differs; layers below are never recomputed. With `positions="response"` all branches share the keys
and values of the prompt.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.errors import ScoreError
from dps_lens.intervene import Ablation, Edit, Positions, Where, attention_for, everywhere, window
from dps_lens.model import PromptCache, Residuals, Runner, reused_logits

BatchSize: TypeAlias = int | Literal["auto"]
_CPU_TOKENS, _GPU_TOKENS = 512, 16384
_RESIDUAL_BYTES = 4 * 2**30
_CACHED_ROWS = 16


def token_losses(logits: Float[Tensor, "pos d_vocab"], targets: Int[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    """−log p of each response token, in float32.

    The one reducer of every path: `logsumexp − gold`. A float32 `log_softmax` over a large vocabulary is
    biased by about 1e-5 a token against it.
    """
    logits = logits.float()
    # In parts whose temporaries stay in the processor's cache.
    total = torch.cat([part.logsumexp(-1) for part in logits.split(_CACHED_ROWS)])
    return total - logits.gather(-1, targets.to(logits.device)[:, None])[:, 0]


def row_losses(logits: Float[Tensor, "row pos d_vocab"], targets: Int[Tensor, " pos"]) -> Float64[Tensor, "row pos"]:
    """−log p of each response token in each row, nats."""
    # Row by row: over a large vocabulary the temporaries of a whole batch would be fresh memory every time.
    return torch.stack([token_losses(row, targets) for row in logits]).cpu().double()


def response_nll(logits: Float[Tensor, "row pos d_vocab"], targets: Int[Tensor, " pos"]) -> Float64[Tensor, " row"]:
    """`−(1/T) Σ log p(y_t)` of each row, nats per token."""
    return row_losses(logits, targets).mean(-1)


class Branches:
    """Scores ablated branches of one prompt.

    Args:
        runner: of the model.
        prompt: with its response.
        ablation: what the branches do; decides which attention runs.
        positions: where they do it.
        batch_size: rows of a batch; `"auto"` fills about 512 tokens on a CPU, up to 16,384 on a GPU, as memory
            allows.

    Attributes:
        losses: `Float64[Tensor, "pos"]`, −log p of each response token under the unablated model.
        nll: their mean, nats per token.
    """

    def __init__(
        self,
        runner: Runner,
        prompt: Prompt,
        *,
        ablation: Ablation = "zero",
        positions: Positions = "response",
        batch_size: BatchSize = "auto",
    ) -> None:
        self.runner, self.prompt, self.ablation, self.positions = runner, prompt, ablation, positions
        start, stop = prompt.spans["response"]
        if stop <= start:
            raise ScoreError(f"example {prompt.example_id!r}: the prompt has no response to score")
        tokens = prompt.tokens[None].to(runner.device)
        self.targets = tokens[0, start:stop]
        # The last response token is never an input of what is read.
        self.begin = start - 1 if positions == "response" else 0
        self.tokens = tokens[:, self.begin : stop - 1]
        self.where: Where = everywhere if positions in ("response", "all") else window(prompt, positions)
        self.prompt_cache: PromptCache | None = None
        self.residuals: Residuals = dict.fromkeys(range(0, runner.cfg.n_layers, self._spacing()))
        with torch.inference_mode(False), torch.no_grad(), attention_for(runner.model, ablation):
            if self.begin:
                self.prompt_cache = runner.prefill(tokens[:, : self.begin])
            logits = runner.logits(self.tokens, prompt=self.prompt_cache, keep=len(self.targets), record=self.residuals)
        self.losses = row_losses(logits, self.targets)[0]
        self.nll = float(self.losses.mean())
        self.batch_size = self._rows_per_batch(batch_size)
        if not math.isfinite(self.nll):
            raise ScoreError(
                f"example {prompt.example_id!r}: the model's NLL is {self.nll}; check_model(model) looks for NaN in "
                "the weights"
            )

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
        kept = max(found for found in self.residuals if found <= layer)
        residual = self.residuals[kept]
        for between in range(kept, layer):
            residual = self.runner.block(between, residual, self.tokens, prompt=self.prompt_cache)
        return residual

    def ablated(
        self, masks: Bool[Tensor, "row layer head"], values: Tensor | None = None, where: Where | None = None
    ) -> Float64[Tensor, " row"]:
        """NLL of the response with the heads of each row ablated, nats per token; arguments of `ablated_losses`."""
        return self.ablated_losses(masks, values, where).mean(-1)

    @torch.inference_mode()
    def ablated_losses(
        self, masks: Bool[Tensor, "row layer head"], values: Tensor | None = None, where: Where | None = None
    ) -> Float64[Tensor, "row pos"]:
        """−log p of each response token with the heads of each row ablated.

        Args:
            masks: heads of each branch; a row without heads gives the clean losses.
            values: as in `ablate`, for `mean` and `patch`.
            where: edit fewer positions than `positions` says.
        """
        losses = self.losses.repeat(len(masks), 1)
        where = where or self.where
        if where(self.tokens.shape[1]) is None:
            return losses
        used = masks.any(-1)
        first = torch.where(used.any(-1), used.int().argmax(-1), -1)
        order = [int(row) for row in first.argsort(stable=True) if first[row] >= 0]
        with ExitStack() as stack:
            stack.enter_context(attention_for(self.runner.model, self.ablation))
            stack.enter_context(reused_logits(self.runner.model))
            while order:
                rows = order[: self.batch_size]
                try:
                    losses[rows] = self._run(masks[rows], first[rows].tolist(), values, where)
                except torch.OutOfMemoryError:
                    if len(rows) == 1:
                        raise
                    self.batch_size = len(rows) // 2
                    torch.cuda.empty_cache()
                    continue
                order = order[len(rows) :]
        return losses

    def _run(self, masks: Tensor, first: Sequence[int], values: Tensor | None, where: Where) -> Tensor:
        starts = {layer: self.residual(layer).expand(first.count(layer), -1, -1) for layer in dict.fromkeys(first)}
        with Edit(masks, self.ablation, where, values, growing=True).on(self.runner.model):
            logits = self.runner.resume(starts, self.tokens, prompt=self.prompt_cache, keep=len(self.targets))
        return row_losses(logits, self.targets)


def single_heads(n_layers: int, n_heads: int) -> Bool[Tensor, "row layer head"]:
    """One row for each head, by layer, then head."""
    return torch.eye(n_layers * n_heads, dtype=torch.bool).reshape(-1, n_layers, n_heads)
