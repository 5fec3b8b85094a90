"""Differential Preference Steering: decode by contrasting the model with itself without some heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.data import Prompt
from dps_lens.errors import PromptError, SteeringError
from dps_lens.heads import HeadSet
from dps_lens.intervene import Ablation, Edit, Positions, Selection, attention_for, everywhere, row_masks
from dps_lens.model import HookedModel, Runner
from dps_lens.steering.sampling import Sampler

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Generation:
    """What `generate` wrote, one entry a prompt.

    Attributes:
        texts: the new text.
        tokens: the new token ids, the end-of-turn token included where there is one.
        logprobs: log-probability of each new token under the steered distribution (before temperature).
        shifts: the same minus its log-probability under the full model: what steering did to it.
        settings: how it was made.
    """

    texts: list[str]
    tokens: list[Int[Tensor, " _"]]
    logprobs: list[Float[Tensor, " _"]]
    shifts: list[Float[Tensor, " _"]]
    settings: dict[str, Any]
    _delta_logits: list[Float[Tensor, "_ d_vocab"]] | None = None

    @property
    def delta_logits(self) -> list[Float[Tensor, "_ d_vocab"]]:
        """Steered minus full logits at every step.

        Raises:
            SteeringError: they were not kept.
        """
        if self._delta_logits is None:
            raise SteeringError("delta_logits were not kept; call generate(…, keep_delta_logits=True)")
        return self._delta_logits

    def to_frame(self) -> "pandas.DataFrame":
        """One row a prompt: text, length, mean log-probability and mean shift."""
        import pandas as pd

        return pd.DataFrame(
            {
                "text": self.texts,
                "tokens": [len(tokens) for tokens in self.tokens],
                "logprob": [float(values.mean()) for values in self.logprobs],
                "shift": [float(values.mean()) for values in self.shifts],
            }
        )


@torch.inference_mode()
def generate(
    model: HookedModel,
    prompts: "Prompt | str | Sequence[Prompt | str]",
    *,
    heads: HeadSet | Sequence[HeadSet],
    gamma: float | Sequence[float] = 1.0,
    rule: Literal["dps"] = "dps",
    ablation: Ablation = "zero",
    positions: Positions = "response",
    max_new_tokens: int = 64,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    stop_at_eos: bool = True,
    keep_delta_logits: bool = False,
    progress: bool = False,
) -> Generation:
    """Generate with DPS: `logits = (1 + γ) · full − γ · masked` (arXiv 2604.22345).

    Both branches see the same prompt and run as rows of one batch with a KV cache. Combining logits
    or log-probabilities gives the same distribution: they differ by a constant a row.

    Args:
        model: a hooked model.
        prompts: of `build_prompt`, or texts that are given to the model as they are. Prompts may differ
            in length; a reference answer in them is not shown to the model.
        heads: one set for all prompts, or one a prompt.
        gamma: strength, one for all prompts or one a prompt, at least −1. 0 is the model's own decoding and
            costs nothing extra; −1 is the masked model.
        rule: `"dps"`.
        ablation: `"zero"` or `"uniform"`, what the masked branch does to the heads.
        positions: `"response"` (from the last prompt token on; both branches share the prompt's pass),
            `"all"` or `"profile"`.
        max_new_tokens: stop after so many.
        do_sample: sample instead of greedy decoding.
        temperature: of sampling.
        top_k: sample from the `top_k` likeliest tokens.
        top_p: sample from the smallest set of tokens that holds this probability.
        seed: of sampling, one for all prompts or one a prompt.
        stop_at_eos: end a row at the model's end-of-text or end-of-turn token.
        keep_delta_logits: keep steered minus full logits of every step.
        progress: show a progress bar.

    Raises:
        SteeringError: arguments do not fit together.
        PromptError: a prompt and its new tokens do not fit the context.
    """
    batch = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    strengths = _per_row("gamma", gamma, len(batch))
    sets = [heads] * len(batch) if isinstance(heads, HeadSet) else list(heads)
    if rule != "dps":
        raise SteeringError(f"generate: rule {rule!r} is unknown; use 'dps'")
    if not batch or len(sets) != len(batch):
        raise SteeringError(f"generate: {len(batch)} prompts and {len(sets)} head sets; give one set for each prompt")
    if ablation not in ("zero", "uniform"):
        raise SteeringError(f"generate: ablation {ablation!r} is not offered here; use 'zero' or 'uniform'")
    if max_new_tokens < 1:
        raise SteeringError(f"generate: max_new_tokens {max_new_tokens} asks for no token")
    if min(strengths) < -1:
        raise SteeringError(f"generate: gamma {min(strengths)} is below -1, the masked model")
    sampler = Sampler(do_sample, temperature, top_k, top_p)
    generators = [torch.Generator().manual_seed(int(value)) for value in _per_row("seed", seed, len(batch))]
    steps = _Steps(model, batch, sets, torch.tensor(strengths), ablation, positions, max_new_tokens)
    ends = _end_tokens(model) if stop_at_eos else set()
    chosen, logprobs, shifts, deltas = [], [], [], []
    running = torch.ones(len(batch), dtype=torch.bool)
    for full, steered in tqdm(steps, total=max_new_tokens, desc="generating", disable=None if progress else True):
        token = sampler(steered, generators)
        logprob = _logprob(steered, token)
        chosen.append(token.cpu())
        logprobs.append(logprob.cpu())
        shifts.append((logprob - _logprob(full, token)).cpu())
        if keep_delta_logits:
            deltas.append((steered - full).cpu())
        running &= torch.tensor([int(value) not in ends for value in token])
        if not bool(running.any()):
            break
        steps.push(token)
    lengths = [_length(row, ends) for row in torch.stack(chosen, dim=1).tolist()]

    def by_row(columns: list[Tensor]) -> list[Tensor]:
        return [torch.stack([column[row] for column in columns])[:n] for row, n in enumerate(lengths)]

    tokens = by_row(chosen)
    return Generation(
        [model.tokenizer.decode(row, skip_special_tokens=True) for row in tokens],
        tokens,
        by_row(logprobs),
        by_row(shifts),
        {
            "rule": rule,
            "gamma": strengths,
            "heads": [str(head_set) for head_set in sets],
            "ablation": ablation,
            "positions": positions,
            "seed": seed,
        },
        by_row(deltas) if keep_delta_logits else None,
    )


class _Steps:
    """Iterates over `(full, steered)` logits; `push` hands in the tokens chosen from them."""

    def __init__(
        self,
        model: HookedModel,
        batch: Sequence[Prompt | str],
        sets: Sequence[HeadSet],
        strengths: Float[Tensor, " row"],
        ablation: Ablation,
        positions: Positions,
        max_new_tokens: int,
    ) -> None:
        self.model, self.runner, self.ablation, self.positions = model, Runner.of(model), ablation, positions
        self.max_new_tokens = max_new_tokens
        self.strengths = strengths.to(self.runner.device)
        self.branched = (self.strengths != 0).nonzero().flatten()
        rows = [_ids(model, prompt) for prompt in batch]
        longest = max(len(row) for row in rows)
        if longest + max_new_tokens > model.cfg.n_ctx:
            raise PromptError(
                f"generate: {longest} prompt tokens and {max_new_tokens} new ones do not fit the context of "
                f"{model.cfg.n_ctx}; lower max_new_tokens or shorten the prompt"
            )
        pad = model.tokenizer.pad_token_id or 0
        self.tokens = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=pad) for row in rows])
        self.mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
        self.profile = torch.stack(
            [_profile(prompt, longest, len(row)) for prompt, row in zip(batch, rows, strict=True)]
        )
        if positions == "profile" and not bool(self.profile[self.branched.cpu()].any(-1).all()):
            raise SteeringError("generate: positions='profile' needs prompts that show a profile")
        self.tokens, self.mask = self.tokens.to(self.runner.device), self.mask.to(self.runner.device)
        everyone = torch.arange(len(batch), device=self.runner.device)
        self.order = torch.cat([everyone, self.branched])
        masks = row_masks(list(sets), model.cfg).to(self.runner.device)
        # Rows of the full branch carry empty masks.
        self.masks = torch.cat([torch.zeros_like(masks), masks[self.branched]])

    def __iter__(self) -> Any:
        n_full = len(self.tokens)
        with attention_for(self.model, self.ablation):
            cache = self._prefill()
            self.next = self.tokens[self.order][:, -1:]
            mask = self.mask[self.order]
            edit = Edit(self.masks, self.ablation, everywhere if self.positions != "profile" else _nowhere)
            for step in range(self.max_new_tokens):
                if step:
                    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                with edit.on(self.model):
                    logits = self.runner.step(self.next, cache, mask).float()
                full = logits[:n_full]
                steered = full.clone()
                strength = self.strengths[self.branched, None]
                steered[self.branched] = (1 + strength) * full[self.branched] - strength * logits[n_full:]
                yield full, steered

    def push(self, tokens: Int[Tensor, " row"]) -> None:
        self.next = tokens[self.order, None]

    def _prefill(self) -> Any:
        """Everything before the last prompt token: once a prompt, or once a branch where branches differ there."""
        if self.positions == "response":
            rows = torch.cat([self.tokens, self.mask], dim=1)
            _, same = rows.unique(dim=0, return_inverse=True)
            first = torch.stack([(same == index).nonzero()[0, 0] for index in range(int(same.max()) + 1)])
            prompt = self.runner.prefill(self.tokens[first, :-1], self.mask[first, :-1])
            return self.runner.start_decoding(prompt, same[self.order])
        where = self.profile[self.order.cpu()][:, :-1]

        def profile(n_pos: int) -> Selection:
            return where

        edit = Edit(self.masks, self.ablation, profile if self.positions == "profile" else everywhere)
        with edit.on(self.model):
            prompt = self.runner.prefill(self.tokens[self.order][:, :-1], self.mask[self.order][:, :-1])
        return self.runner.start_decoding(prompt, torch.arange(len(self.order), device=self.order.device))


def _nowhere(n_pos: int) -> Selection:
    return None


def _ids(model: HookedModel, prompt: Prompt | str) -> Int[Tensor, " pos"]:
    if isinstance(prompt, Prompt):
        ids = prompt.prompt_tokens
    else:
        ids = torch.tensor(model.tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=torch.long)
        bos = model.tokenizer.bos_token_id
        # A chat template opens with its own marker, which for some models is the BOS token.
        if bos is not None and ids[:1].tolist() != [bos]:
            ids = torch.cat([torch.tensor([bos]), ids])
    if len(ids) < 2:
        raise SteeringError("generate: a prompt needs at least two tokens, the start token included")
    return ids


def _profile(prompt: Prompt | str, longest: int, length: int) -> Bool[Tensor, " pos"]:
    inside = torch.zeros(longest, dtype=torch.bool)
    if isinstance(prompt, Prompt):
        start, stop = prompt.spans["profile"]
        inside[longest - length + start : longest - length + stop] = True
    return inside


def _per_row(name: str, value: Any, rows: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) else [value] * rows
    if len(values) != rows:
        raise SteeringError(f"generate: {len(values)} values of {name} for {rows} prompts")
    return values


def _logprob(logits: Float[Tensor, "row d_vocab"], token: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    return logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)


def _end_tokens(model: HookedModel) -> set[int]:
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return {int(token) for token in (*found, model.tokenizer.eos_token_id) if token is not None}


def _length(row: list[int], ends: set[int]) -> int:
    """Tokens of a row up to its first end token, that token included."""
    return next((index + 1 for index, token in enumerate(row) if token in ends), len(row))
