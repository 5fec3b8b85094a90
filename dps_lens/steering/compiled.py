"""Branches decoded by a step that torch compiles: fixed shapes, edits as tensors, nothing that waits for the device."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dps_lens.errors import ModelCheckError, SteeringError, reason
from dps_lens.intervene import Patch, Scale, Uniform, Zero, attention_for
from dps_lens.model import HookedModel, Hooks, is_bridge, native_attention, runner_of
from dps_lens.model.fast.program import StepEdits, StepProgram, static_state
from dps_lens.model.runner import PromptCache
from dps_lens.model.trials import tried
from dps_lens.steering.decoder import Decoder, Row, adding

_KEPT = "_dps_lens_step_program"
_Z, _RESIDUAL = re.compile(r"blocks\.(\d+)\.attn\.hook_z"), re.compile(r"blocks\.(\d+)\.hook_resid_post")


class CompiledDecoder(Decoder):
    """As `Decoder`, whose tokens it writes; hooks of others do not act in its steps.

    Rows that leave stay in the batch, unseen, until half of it is idle: another number of rows is another shape, which
    torch compiles anew.

    Raises:
        SteeringError: the ablation edits attention scores in a way of its own.
        ModelCheckError: the model has no step that torch compiles.
    """

    def __init__(self, model: HookedModel, rows: Sequence[Row], **options: Any) -> None:
        super().__init__(model, rows, **options)
        if self.ablation.site != "hook_z" and not isinstance(self.ablation, Uniform):
            raise SteeringError(
                f"generate: ablation {self.ablation.name!r} edits attention scores, which a compiled step does not "
                "compute; leave compile out"
            )
        self._program = program_of(model)
        self._batch = list(self.rows)  # with those that have left
        self._places = torch.arange(len(rows), device=self.device)

    @torch.inference_mode()
    def _attach(self) -> None:
        if self._cache is None:
            with attention_for(self.model, self.ablation):
                self._cache = self._prefill()
            self._install()
        self._attention.enter_context(native_attention(self.model))

    def _start(self, prompt: PromptCache, rows: Int[Tensor, " row"]) -> Any:
        return static_state(prompt, rows, torch.tensor(self._gaps, device=self.device), self._room)

    def _install(self) -> None:
        """What the step is told about the rows of the batch."""
        self._edits = edits = StepEdits()
        cfg, n_rows = self.model.cfg, len(self._batch)
        heads = self.factors != 1
        if self.positions != "profile" and bool(heads.any()):
            if isinstance(self.ablation, Zero):
                edits.factors = self.factors.clone()
            else:
                edits.masks = self.factors == 0
            if isinstance(self.ablation, Patch):
                edits.source = self._negatives()
            elif not isinstance(self.ablation, Zero | Uniform):
                edits.replace = self.ablation.replace
                edits.values = None if self._values is None else self._values.to(self.device, copy=True)
        for name, values in self._added.items():
            if found := _Z.fullmatch(name):
                if edits.added is None:
                    edits.added = torch.zeros(n_rows, cfg.n_layers, cfg.n_heads, cfg.d_head, device=self.device)
                edits.added[:, int(found[1])] = values
            elif found := _RESIDUAL.fullmatch(name):
                if edits.residual is None:
                    edits.residual = torch.zeros(n_rows, cfg.n_layers, cfg.d_model, device=self.device)
                edits.residual[:, int(found[1])] = values
            else:
                raise SteeringError(f"generate: nothing can be added at {name!r} in a compiled step")
        dtype = next(self.model.parameters()).dtype
        edits.early = {
            layer: torch.empty(n_rows, 1, cfg.d_model, device=self.device, dtype=dtype) for layer in self._early
        }

    @torch.inference_mode()
    def step(
        self, tokens: Int[Tensor, " row"] | None = None
    ) -> tuple[Float[Tensor, "row d_vocab"], Float[Tensor, "layer row d_vocab"]]:
        # Made anew at every step: another kind of tensor, or another stride, would be compiled for itself.
        column = self.tokens[:, -1:].clone(memory_format=torch.contiguous_format)
        if tokens is not None:
            column[self._places] = tokens[:, None]
        logits = self._program(column, self._cache, self._edits)[self._places]
        self._cache.position += 1
        self._early = {layer: noted[self._places] for layer, noted in self._edits.early.items()}
        return logits, self._read_early(logits, column[self._places])

    @torch.inference_mode()
    def keep(self, rows: Bool[Tensor, " row"]) -> None:
        self.rows = [row for row, stays in zip(self.rows, rows.tolist(), strict=True) if stays]
        self._places = self._places[rows.to(self.device)]
        if 2 * len(self._places) > len(self._batch):
            return
        index, self._batch = self._places, list(self.rows)
        self.tokens, self.factors = self.tokens[index], self.factors[index]
        self._added = {name: values[index] for name, values in self._added.items()}
        self._cache = self._cache.select(index)
        self._places = torch.arange(len(index), device=self.device)
        self._install()


def program_of(model: HookedModel) -> StepProgram:
    """The compiled step of a model, made once and kept with it.

    Raises:
        ModelCheckError: the model is no bridge, or its step with static caches gives other logits than its own.
    """
    kept = vars(model)
    if _KEPT not in kept:
        if problem := tried(model, "static steps", lambda: _problem(model)):
            raise ModelCheckError(f"generate: compile=True does not go with this model: {problem}")
        kept[_KEPT] = StepProgram(model)
    program: StepProgram = kept[_KEPT]
    return program


@torch.inference_mode()
def _problem(model: HookedModel) -> str:
    """What is wrong with a step with static caches: edited, of two rows, one of them padded."""
    if not is_bridge(model):
        return "it is no TransformerBridge"
    cfg, runner = model.cfg, runner_of(model)
    device, generator = runner.device, torch.Generator().manual_seed(0)
    tokens = torch.randint(2, cfg.d_vocab, (2, 6), generator=generator).to(device)
    gaps = torch.tensor([0, 2], device=device)
    mask = (torch.arange(6, device=device) >= gaps[:, None]).long()
    factors = torch.rand(2, cfg.n_layers, cfg.n_heads, generator=generator).to(device)
    residual = torch.zeros(2, cfg.n_layers, cfg.d_model, device=device)
    residual[:, 0] = 0.1 * torch.randn(2, cfg.d_model, generator=generator).to(device)
    added = {"blocks.0.hook_resid_post": residual[:, 0]}
    try:
        with native_attention(model):
            prompt = runner.prefill(tokens[:, :5], mask[:, :5])
            rows = torch.arange(2, device=device)
            with Scale(factors).on(model), Hooks(model, adding(added)):
                own = runner.step(tokens[:, 5:], runner.start_decoding(prompt, rows), mask).float()
            state, edits = static_state(prompt, rows, gaps, 1), StepEdits(factors=factors, residual=residual)
            ours = StepProgram(model, compiled=False)(tokens[:, 5:].clone(), state, edits)
    except Exception as error:  # whatever an architecture raises that knows no static cache
        return reason(error)
    apart = float((ours - own).norm() / own.norm())
    most = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.05
    return "" if apart < most else f"with static caches its logits differ by {apart:.1%}"
