"""Branches decoded by a step that torch compiles: fixed shapes, edits as tensors, nothing that waits for the device."""

import re
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dps_lens.errors import ModelCheckError, SteeringError, reason
from dps_lens.intervene import Patch, Scale, Uniform, Zero, attention_for
from dps_lens.model import HookedModel, Hooks, has_hooks, is_bridge, native_attention, runner_of
from dps_lens.model.fast.program import StepEdits, StepProgram
from dps_lens.model.fast.switch import is_fast
from dps_lens.model.protocol import hf_model_of
from dps_lens.model.runner import PromptCache
from dps_lens.model.trials import tried
from dps_lens.steering.decoder import Decoder, Row, adding

_PROGRAMS: "weakref.WeakKeyDictionary[Any, StepProgram]" = weakref.WeakKeyDictionary()
_BACKEND = "inductor"
_TRIED = 300
_Z, _RESIDUAL = re.compile(r"blocks\.(\d+)\.attn\.hook_z"), re.compile(r"blocks\.(\d+)\.hook_resid_post")


class CompiledDecoder(Decoder):
    """As `Decoder`, whose tokens it writes.

    The number of rows is rounded up to a power of two, and halved when half of the batch has left: another number is
    another shape, which torch compiles anew. What fills the batch up writes what the first row does, unseen.

    Raises:
        SteeringError: the ablation edits attention scores in a way of its own, or hooks of others are on the model.
        ModelCheckError: the model has no step that torch compiles.
    """

    def __init__(self, model: HookedModel, rows: Sequence[Row], **options: Any) -> None:
        super().__init__(model, rows, **options)
        if self.ablation.site != "hook_z" and not isinstance(self.ablation, Uniform):
            raise SteeringError(
                f"generate: ablation {self.ablation.name!r} edits attention scores, which a compiled step does not "
                "compute; leave compile out"
            )
        self._check_hooks()
        self._program = program_of(model)
        self._fill(torch.arange(len(self.rows), device=self.device))

    def _check_hooks(self) -> None:
        """Refuse hooks of others, which a compiled step would leave out without a word."""
        if has_hooks(self.model):
            raise SteeringError(
                "generate: there are hooks on the model (ablate, vector.on, …), which a compiled step would not run; "
                "leave compile out, or the context that put them there"
            )

    def _fill(self, index: Int[Tensor, " row"]) -> None:
        """Lay these rows out as a batch of a round number of rows."""
        spare = (1 << (len(index) - 1).bit_length()) - len(index)
        self._index = torch.cat([index, index[:1].expand(spare)])
        self._places = torch.arange(len(index), device=self.device)
        self._batch_tokens = self.tokens[self._index]
        self._batch_factors = self.factors[self._index]
        self._batch_added = {name: values[self._index] for name, values in self._added.items()}

    @torch.inference_mode()
    def _attach(self) -> None:
        self._check_hooks()  # a stream may go on where somebody has put them meanwhile
        if self._cache is None:
            with attention_for(self.model, self.ablation):
                self._cache = self._prefill()
            # What is left of a batch, also of a stream that nobody reads to its end, goes back to the program.
            weakref.finalize(self, self._program.end, self._cache)
            self._install()
        self._attention.enter_context(native_attention(self.model))

    def _start(self, prompt: PromptCache, rows: Int[Tensor, " row"]) -> Any:
        gaps = torch.tensor(self._gaps, device=self.device)[self._index]
        return self._program.begin(prompt, rows[self._index], gaps, self._room)

    def _install(self) -> None:
        """What the step is told about the rows of the batch."""
        self._edits = edits = StepEdits(early=tuple(self._early))
        cfg, n_rows, factors = self.model.cfg, len(self._index), self._batch_factors
        if self.positions != "profile" and bool((factors != 1).any()):
            if isinstance(self.ablation, Zero):
                edits.factors = factors
            else:
                edits.masks = factors == 0
            if isinstance(self.ablation, Patch):
                edits.source = self._sources()
            elif not isinstance(self.ablation, Zero | Uniform):
                edits.replace = self.ablation.replace
                edits.values = None if self._values is None else self._values.to(self.device, copy=True)
        for name, values in self._batch_added.items():
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

    def _sources(self) -> Int[Tensor, " row"]:
        """For each row of the batch, the one that runs its request's negative prompt; itself where there is none."""
        sources, rows = self._negatives(), torch.arange(len(self._index), device=self.device)
        return torch.cat([sources, rows[len(sources) :]])

    @torch.inference_mode()
    def step(
        self, tokens: Int[Tensor, " row"] | None = None
    ) -> tuple[Float[Tensor, "row d_vocab"], Float[Tensor, "layer row d_vocab"]]:
        # Made anew at every step: another kind of tensor, or another stride, would be compiled for itself.
        column = self._batch_tokens[:, -1:].clone(memory_format=torch.contiguous_format)
        if tokens is not None:
            column[self._places] = tokens[:, None]
        logits, early = self._program(column, self._cache, self._edits)
        self._cache.position += 1
        self._early = {layer: one[self._places] for layer, one in zip(self._edits.early, early, strict=True)}
        logits = logits[self._places]
        return logits, self._read_early(logits, column[self._places])

    @torch.inference_mode()
    def keep(self, rows: Bool[Tensor, " row"]) -> None:
        self.rows = [row for row, stays in zip(self.rows, rows.tolist(), strict=True) if stays]
        self._places = self._places[rows.to(self.device)]
        if 2 * len(self._places) > len(self._index):
            return
        places, index = self._places, self._index[self._places]
        self.tokens, self.factors = self.tokens[index], self.factors[index]
        self._added = {name: values[index] for name, values in self._added.items()}
        self._fill(torch.arange(len(index), device=self.device))
        self._cache = self._cache.select(places[self._index])
        self._install()


def program_of(model: HookedModel) -> StepProgram:
    """The compiled step of a model, made once.

    Raises:
        ModelCheckError: the model is no bridge, torch cannot trace its step, or the step with static caches gives other
            logits than its own.
    """
    program = _PROGRAMS.get(model)
    if program is None or not program.is_of(model):
        if problem := tried(model, "static steps", lambda: _problem(model)):
            raise ModelCheckError(f"generate: compile=True does not go with this model: {problem}")
        with native_attention(model):
            program = _PROGRAMS[model] = StepProgram(model, backend=_BACKEND)
    return program


@torch.inference_mode()
def _problem(model: HookedModel) -> str:
    """What is wrong with a step with static caches: traced, edited, of two rows, one of them padded, behind a prompt
    that is longer than a window."""
    if not is_bridge(model):
        return "it is no TransformerBridge"
    if not is_fast():
        return "the fast paths are switched off"
    cfg, runner, config = model.cfg, runner_of(model), hf_model_of(model).config.get_text_config(decoder=True)
    if kinds := sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}):
        return f"it has layers of {kinds[0]}"
    length = min(max(_TRIED, (getattr(config, "sliding_window", None) or 0) + 8), cfg.n_ctx - 1)
    device, generator = runner.device, torch.Generator().manual_seed(0)
    tokens = torch.randint(2, cfg.d_vocab, (2, length), generator=generator).to(device)
    gaps = torch.tensor([0, 2], device=device)
    mask = (torch.arange(length, device=device) >= gaps[:, None]).long()
    factors = torch.rand(2, cfg.n_layers, cfg.n_heads, generator=generator).to(device)
    residual = torch.zeros(2, cfg.n_layers, cfg.d_model, device=device)
    residual[:, 0] = 0.1 * torch.randn(2, cfg.d_model, generator=generator).to(device)
    added = {"blocks.0.hook_resid_post": residual[:, 0]}
    try:
        with native_attention(model):
            prompt = runner.prefill(tokens[:, :-1], mask[:, :-1])
            rows = torch.arange(2, device=device)
            with Scale(factors).on(model), Hooks(model, adding(added)):
                own = runner.step(tokens[:, -1:], runner.start_decoding(prompt, rows), mask).float()
            program = StepProgram(model, backend="eager" if _BACKEND else None)
            state = program.begin(prompt, rows, gaps, 1)
            ours, _ = program(tokens[:, -1:].clone(), state, StepEdits(factors=factors, residual=residual))
    except Exception as error:  # whatever an architecture raises that knows no static cache, or torch that cannot trace
        return reason(error)
    apart = float((ours - own).norm() / own.norm())
    most = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.05
    return "" if apart < most else f"with static caches its logits differ by {apart:.1%}"
