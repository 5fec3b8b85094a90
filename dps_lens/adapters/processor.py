"""DPS inside the `generate` of transformers: a logits processor that runs the masked branch."""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from dps_lens.adapters.passes import Passes, masked_pass
from dps_lens.errors import SteeringError
from dps_lens.heads import HeadSet
from dps_lens.intervene import Ablation, AblationLike, Edit, attention_for, find_ablation, row_masks
from dps_lens.model import HookedModel, check_attention_reads, hf_model_of, is_bridge, runner_of
from dps_lens.model.positions import check_switch, rotary_switch
from dps_lens.steering.rules import Rule, RuleLike, check_strength, find_rule
from dps_lens.steering.terms import combine


def logits_processor(
    model: HookedModel,
    heads: HeadSet,
    gamma: float = 1.0,
    *,
    rule: RuleLike = "dps",
    ablation: AblationLike | None = None,
    positions: Literal["response", "all"] = "response",
    attention_mask: Int[Tensor, "row pos"] | None = None,
) -> "DPSLogitsProcessor":
    """DPS for `model.original_model.generate(ids, logits_processor=[…])`.

    `log p = (1 + γ) · log p_full − γ · log p_masked`, normalised: the distribution of `dps.generate`, before
    temperature, top_k and top_p. `log p_full` is what the model itself gave in the pass before. Tokens that processors
    before this one rule out stay ruled out; where they change other scores (`repetition_penalty`, `sequence_bias`, …),
    this raises, as no distribution is documented for that. Processors after this one work on the steered scores.

    Args:
        model: a `TransformerBridge`; `generate` is called on its `original_model`.
        heads: the heads that the masked branch does without.
        gamma: strength, at least −1. 0 is the model's own decoding and costs nothing extra; −1 is the masked model.
        rule: `"dps"`, `"dps-entropy"`, `"decore"`, or a `Term` of your own that looks at the masked branch.
        ablation: as in `generate`.
        positions: `"response"` (from the last prompt token on) or `"all"`.
        attention_mask: of the prompts, as given to `generate`; needed where they are padded. The processor
            then serves this batch only.

    Raises:
        SteeringError: arguments do not fit together; while text is written: scores come from a processor that changed
            them, the model ran with another attention mask, or logits are NaN or infinite.
        PromptError: while text is written: the text crosses a length at which the model's rotary factors change.
        HeadError: a head is outside the model.

    >>> steering = logits_processor(model, HeadSet.parse("L12H3"), gamma=1.0)
    >>> model.original_model.generate(ids, logits_processor=[steering], max_new_tokens=64)
    """
    if not is_bridge(model):
        raise SteeringError(
            "logits_processor: a HookedTransformer has no generate of transformers; use dps.generate, or load the "
            "model with transformer-lens>=4"
        )
    check_attention_reads("logits_processor", model)  # which is the attention that generate of transformers runs
    chosen = find_rule(rule)
    if [term.branch for term in chosen.terms] != ["ablated"]:
        raise SteeringError(
            f"logits_processor: rule {chosen.name!r} is not one of masked heads alone; use dps.generate"
        )
    if positions not in ("response", "all"):
        raise SteeringError(
            f"logits_processor: positions {positions!r} are not offered here; use 'response' or 'all' "
            "('profile' needs the prompt's spans: dps.generate)"
        )
    check_strength("gamma", gamma)
    own = chosen.terms[0].ablation
    masked = find_ablation(own if own is not None else ablation if ablation is not None else "zero")
    return DPSLogitsProcessor(model, heads, gamma, chosen, masked, positions, attention_mask)


class DPSLogitsProcessor(LogitsProcessor):
    """Made by `logits_processor`; runs the masked branch with its own keys and values.

    Works in greedy decoding, sampling and beam search, and with `positions="all"` in assisted decoding.
    One processor serves one `generate` after another. Ids that extend the last ones by one token go on
    where those ended, so a response generated in pieces equals one generated at once; with
    `positions="response"` it still begins where it began. `reset` makes the next ids a new prompt, and
    frees the keys and values, which are otherwise kept until the next prompt.
    """

    def __init__(
        self,
        model: HookedModel,
        heads: HeadSet,
        gamma: float,
        rule: Rule,
        ablation: Ablation,
        positions: Literal["response", "all"],
        attention_mask: Int[Tensor, "row pos"] | None,
    ) -> None:
        self.model, self.heads, self.gamma, self.rule, self.positions = model, heads, gamma, rule, positions
        self.ablation = ablation
        self.attention_mask = attention_mask
        self._runner = runner_of(model)
        values = ablation.standalone("logits_processor")
        self._edit = Edit(row_masks(heads, model.cfg).to(self._runner.device), ablation, values=values)
        self._padded_prompt: Tensor | None = None
        self._passes = Passes(hf_model_of(model))
        self.reset()

    def reset(self) -> None:
        """Take the next ids for a new prompt."""
        self._ids: Tensor | None = None
        self._cache: Any = None
        self._passes.forget()

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "row pos"], scores: Float[Tensor, "row d_vocab"]
    ) -> Float[Tensor, "row d_vocab"]:
        """Steered log-probabilities of the next token; tokens that `scores` rule out stay ruled out."""
        if self.gamma == 0 or not len(self.heads):
            return scores
        full = self._passes.logits(input_ids, scores).log_softmax(-1)
        with masked_pass():
            masked = self._masked_logits(input_ids.to(self._runner.device)).to(full).log_softmax(-1)
        # What a rule finds for itself is not capped by gamma.
        given = torch.inf if self.rule.adaptive else self.gamma
        steered = combine(self.rule.terms, full, {"ablated": masked}, {"ablated": given})
        # Beam search adds these up over steps, so they have to be normalised.
        found = steered.masked_fill(scores.isneginf(), -torch.inf).log_softmax(-1)
        if bool(found.isnan().any()):
            raise SteeringError(
                f"logits_processor: logits after {input_ids.shape[1]} tokens are NaN or infinite; lower gamma, load "
                "the model in float32 or bfloat16, or let check_model(model) look at its weights"
            )
        return found.to(scores.dtype)

    def _masked_logits(self, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row d_vocab"]:
        if not ids.shape[1]:
            raise SteeringError("logits_processor: generate was given inputs_embeds; give it token ids")
        kept = self._keep(ids) or self._begin(ids)
        self._check_lengths(ids)
        # A pass that fails half-way leaves layers of different lengths; the next ids then start afresh.
        self._ids = None
        mask = torch.nn.functional.pad(self._prompt_mask, (0, ids.shape[1] - self._prompt_mask.shape[1]), value=1)
        self._passes.check_mask(ids, mask)
        with attention_for(self.model, self.ablation):
            if not kept and self.positions == "response" and ids.shape[1] > 1:
                kept = ids.shape[1] - 1
                self._runner.step(ids[:, :kept], self._cache, mask[:, :kept])
            with self._edit.on(self.model):
                logits = self._runner.step(ids[:, kept:], self._cache, mask)
        self._ids = ids.clone()
        return logits

    def _check_lengths(self, ids: Int[Tensor, "row pos"]) -> None:
        if rotary_switch(self.model) is None:
            return
        new, first = ids.shape[1] - self._prompt_mask.shape[1], self._prompt_mask.sum(-1)
        start = int(first.min()) - (self.positions == "response")
        check_switch(self.model, "logits_processor", start, int(first.max()) + new)

    def _begin(self, ids: Int[Tensor, "row pos"]) -> int:
        self._prompt_mask = self._mask_of(ids)
        self._cache = DynamicCache()
        return 0

    def _keep(self, ids: Int[Tensor, "row pos"]) -> int:
        """Reorder and shorten the cache to what `ids` share with it; 0 where they are a new prompt."""
        if self._ids is None:
            return 0
        held, start, length = self._ids.shape[1], self._prompt_mask.shape[1], ids.shape[1]
        if not start < length <= held + 1:
            return 0
        shared = (ids[:, None, : length - 1] == self._ids[None, :, : length - 1]).long().cumprod(-1).sum(-1)
        lengths, parents = shared.max(dim=-1)
        kept = int(lengths.min())
        if kept < start:
            return 0
        if self.positions == "response" and kept < held:
            raise SteeringError(
                "logits_processor: these ids hold the prompt of the generation before, but do not continue it; call "
                "reset() before a new prompt, and use positions='all' for assisted decoding"
            )
        if parents.tolist() != list(range(len(self._ids))):
            self._cache.batch_select_indices(parents)
            self._prompt_mask = self._prompt_mask[parents]
        if kept < held:
            self._cache.crop(kept - held)
        return kept

    def _mask_of(self, ids: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
        """The attention mask of new prompts."""
        if self.attention_mask is None:
            self._refuse_padding(ids)
            return torch.ones_like(ids)
        rows = len(self.attention_mask)
        if ids.shape[1] != self.attention_mask.shape[1] or len(ids) % rows:
            raise SteeringError(
                f"logits_processor: attention_mask is {list(self.attention_mask.shape)} and the prompts are "
                f"{list(ids.shape)}; give the attention_mask that generate was given"
            )
        # Beams and num_return_sequences repeat each prompt.
        copies = len(ids) // rows
        if self._padded_prompt is not None and not torch.equal(self._padded_prompt, ids[::copies]):
            raise SteeringError(
                "logits_processor: attention_mask belongs to the prompts before; make a processor for each padded batch"
            )
        self._padded_prompt = ids[::copies].clone()
        return self.attention_mask.to(ids).repeat_interleave(copies, dim=0)

    def _refuse_padding(self, ids: Int[Tensor, "row pos"]) -> None:
        pad, bos = (getattr(self.model.tokenizer, name, None) for name in ("pad_token_id", "bos_token_id"))
        if pad is None:
            return
        leading = (ids == pad).long().cumprod(-1).sum(-1)
        # One leading token may be the start token of every row.
        if int(leading.max()) > int(pad == bos) or len(leading.unique()) > 1:
            raise SteeringError(
                "logits_processor: prompts start with padding; give attention_mask=, the one that generate was given"
            )
