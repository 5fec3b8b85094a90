"""Direct paths in one clean run: what a head writes by itself, and what another head makes of it.

A direct path carries what one head writes to what another one reads, or to the logits, while everything between the two
stays as it was (path patching, Wang et al. 2022, arXiv 2211.00593). Of a patched path only the z of the head that reads
differs, so that all that follows is a patch of this z.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.errors import ModelCheckError
from dps_lens.heads import Head
from dps_lens.model import (
    HookedModel,
    Hooks,
    Residuals,
    Runner,
    check_attention_reads,
    check_attention_writes,
    native_attention,
)
from dps_lens.model.positions import check_switch
from dps_lens.scoring import CleanRun

Into: TypeAlias = Literal["q", "k", "v", "resid"]
INTO: tuple[Into, ...] = get_args(Into)


@dataclass(frozen=True, eq=False)
class DirectPaths:
    """The direct paths of one clean run.

    Attributes:
        run: of a prompt with its response, its z kept.
    """

    run: CleanRun

    @torch.inference_mode()
    def writes(
        self,
        heads: Sequence[Head],
        z: Float[Tensor, "layer pos head d_head"] | Mapping[int, Float[Tensor, "pos head d_head"]],
    ) -> Float[Tensor, "sender pos d_model"]:
        """What a head adds to the residual stream when its z is that of another run, minus what it adds.

        That is `Δz W_O`, with whatever the model does to the output of attention before it is added: a norm of Gemma's,
        a multiplier of Granite's.

        Args:
            heads: the senders.
            z: of the other run, at the positions that are run; at least of the senders' layers.

        Raises:
            ModelCheckError: this architecture does not show what its attention adds.
        """
        found: dict[Head, Tensor] = {}
        for layer, group in groupby(sorted(heads), key=lambda head: head.layer):
            senders = list(group)
            patch = partial(_patch, heads=[head.head for head in senders], z=z[layer])
            entering = self.run.residual(layer).expand(len(senders) + 1, -1, -1)
            # Of the attention alone: a difference of whole residual streams would lose a small write in bfloat16.
            added = self._read(layer, "hook_attn_out", entering, [("attn.hook_z", patch)]).float()
            found.update(zip(senders, (added[1:] - added[:1]).to(self.run.runner.device), strict=True))
        return torch.stack([found[head] for head in heads])

    @torch.inference_mode()
    def received(
        self, layer: int, written: Float[Tensor, "sender pos d_model"], into: Sequence[Into]
    ) -> dict[Into, Float[Tensor, "sender pos head d_head"]]:
        """z of the heads of a layer when each sender's write reaches only what they read it into.

        `"q"`, `"k"` and `"v"` change one of a head's three inputs, `"resid"` all of them. Where heads share keys and
        values, each head gets a changed copy of its own.

        Raises:
            ModelCheckError: the attention of this architecture has no such hook points.
        """
        parts = [part for part in into if part != "resid"]
        found: dict[Into, list[Tensor]] = {part: [] for part in into}
        for chunk in written.split(max(1, self.run.batch_size // (1 + len(parts)))):
            n = len(chunk)
            # The first rows read the write into everything; those of a part take that part from them.
            entering = self.run.residual(layer).expand((1 + len(parts)) * n + 1, -1, -1).clone()
            entering[:n] += chunk.to(entering)
            fired: set[str] = set()
            hooks = [
                (f"attn.hook_{part}", partial(_take, n=n, place=place, part=part, fired=fired))
                for place, part in enumerate(parts, start=1)
            ]
            z = self._changed(layer, entering, hooks)
            if missing := set(parts) - fired:
                raise ModelCheckError(
                    f"patch_paths: hook_{min(missing)} does not fire in this architecture, so that what its heads read "
                    "cannot be told apart; use into='resid'"
                )
            groups = dict(zip(("resid", *parts), z.split(n), strict=True))
            for name in into:
                found[name].append(groups[name])
        return {name: torch.cat(chunks) for name, chunks in found.items()}

    @torch.inference_mode()
    def cut(self, layer: int, spans: Sequence[tuple[int, int]]) -> Float[Tensor, "span pos head d_head"]:
        """z of the heads of a layer that cannot look at one span of the prompt, each span in turn.

        Args:
            layer: whose heads are cut off.
            spans: first position and the one behind the last, in the whole prompt.

        Raises:
            ModelCheckError: this architecture does not obey what is written into its attention scores.
        """
        check_attention_writes("patch_paths", self.run.runner.model)
        entering = self.run.residual(layer).expand(len(spans) + 1, -1, -1)
        return self._changed(layer, entering, [("attn.hook_attn_scores", partial(_blind, spans=spans))])

    @torch.inference_mode()
    def pattern(self, layer: int) -> Float[Tensor, "head query key"]:
        """Attention of the heads of a layer, from the positions that are run to all of the prompt and response.

        Raises:
            ModelCheckError: the attention that is recomputed is not this model's own.
        """
        check_attention_reads("describe_head", self.run.runner.model)
        return self._read(layer, "attn.hook_pattern", self.run.residual(layer), [])[0].float()

    @torch.inference_mode()
    def to_logits(self, written: Float[Tensor, "sender pos d_model"]) -> Float64[Tensor, "sender pos"]:
        """The objective at each response position when the senders' writes reach the final norm, and nothing else."""
        run, last, losses = self.run, self.run.runner.cfg.n_layers - 1, []
        for chunk in written.split(run.batch_size):
            starts = {last + 1: self.final + chunk.to(self.final)}
            logits = run.runner.resume(starts, run.tokens, prompt=run.prompt_cache, keep=len(run.targets))
            losses.append(run.measured(logits))
        return torch.cat(losses)

    @cached_property
    def final(self) -> Float[Tensor, "1 pos d_model"]:
        """The clean residual stream behind the last layer."""
        run, last = self.run, self.run.runner.cfg.n_layers - 1
        with torch.inference_mode(), native_attention(run.runner.model):
            return run.runner.block(last, run.residual(last), run.tokens, prompt=run.prompt_cache)

    def _changed(
        self, layer: int, entering: Float[Tensor, "row pos d_model"], hooks: Sequence[tuple[str, Any]]
    ) -> Float[Tensor, "changed pos head d_head"]:
        """The run's own z, with what each row changes of it; the last row is clean.

        The attention whose inputs have hooks is not the one that the run was made with: their difference would show as
        an effect of rows that change nothing.
        """
        assert self.run.z is not None
        z = self._read(layer, "attn.hook_z", entering, hooks)
        return self.run.z[layer].to(z) + (z[:-1] - z[-1:])

    def _read(self, layer: int, name: str, entering: Tensor, hooks: Sequence[tuple[str, Any]]) -> Tensor:
        """What one hook point of a block shows, with the attention that TransformerLens recomputes, in which q, k, v
        and scores have hooks; the block is left there."""
        run, named = self.run, [(f"blocks.{layer}.{one}", hook) for one, hook in hooks]
        step = partial(run.runner.block, layer, entering, run.tokens, prompt=run.prompt_cache)
        return _seen(run.runner.model, f"blocks.{layer}.{name}", step, named)


_GLANCED = 2048
"""Tokens of a prompt up to which attention from all of its positions at once is cheaper than a whole run."""


class Glance(NamedTuple):
    """What one layer does in a run that goes no further, at the positions that give the response."""

    z: Float[Tensor, "pos head d_head"]
    pattern: Float[Tensor, "head query key"]

    @classmethod
    @torch.inference_mode()
    def of(cls, runner: Runner, prompt: Prompt, layer: int) -> "Glance":
        """Run a prompt up to a layer; a long one to its end, so that only its response attends.

        Raises:
            ModelCheckError: the attention that is recomputed is not this model's own.
        """
        check_attention_reads("describe_head", runner.model)
        start, stop = prompt.spans["response"]
        if stop > _GLANCED:
            run = CleanRun(runner, prompt, keep_z=True)
            assert run.z is not None
            return cls(run.z[layer], DirectPaths(run).pattern(layer))
        check_switch(runner.model, f"example {prompt.example_id!r}", start - 1, stop - 1)
        tokens = prompt.tokens[None, : stop - 1].to(runner.device)
        entering: Residuals = {layer: None}
        with native_attention(runner.model):
            passing = partial(runner.logits, tokens, keep=1, record=entering)
            z = _seen(runner.model, f"blocks.{layer}.attn.hook_z", passing)
        step = partial(runner.block, layer, entering[layer], tokens)
        pattern = _seen(runner.model, f"blocks.{layer}.attn.hook_pattern", step)
        return cls(z[0, start - 1 :].to(runner.device), pattern[0, :, start - 1 :].float())


def _seen(
    model: HookedModel, point: str, passing: Callable[[], Tensor], hooks: Sequence[tuple[str, Any]] = ()
) -> Tensor:
    """What one hook point shows in a pass, which is left there.

    Raises:
        ModelCheckError: there is no such point, or nothing is shown there.
    """
    missing = [one for one, _ in (*hooks, (point, None)) if one not in model.hook_dict]
    try:
        if not missing:
            with Hooks(model, [*hooks, (point, _leave)]):
                passing()
    except _SeenError as seen:
        return seen.value
    raise ModelCheckError(f"{missing[0] if missing else point} does not fire in this architecture; paths need it")


class _SeenError(Exception):
    """Carries what a hook point shows out of a block."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _leave(value: Tensor, hook: object) -> None:
    raise _SeenError(value.detach().clone())


def _patch(own: Tensor, hook: object, *, heads: Sequence[int], z: Tensor) -> Tensor:
    """z of another run in one head of every row but the first."""
    patched = own.clone()
    patched[torch.arange(1, len(heads) + 1), :, heads] = z[:, heads].transpose(0, 1).to(own)
    return patched


def _take(activation: Tensor, hook: object, *, n: int, place: int, part: str, fired: set[str]) -> Tensor:
    fired.add(part)
    taken = activation.clone()
    taken[place * n : (place + 1) * n] = activation[:n]
    return taken


def _blind(scores: Tensor, hook: object, *, spans: Sequence[tuple[int, int]]) -> Tensor:
    blinded = scores.clone()
    for row, (start, stop) in enumerate(spans):
        blinded[row, :, :, start:stop] = torch.finfo(scores.dtype).min
    return blinded
