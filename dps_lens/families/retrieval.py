"""Retrieval heads: which heads copy a needle out of a haystack while the model does (arXiv 2404.15574)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data.tokenizer import Offsets, PromptTokenizer, end_tokens
from dps_lens.errors import ScoreError
from dps_lens.families.work import FamilyWork
from dps_lens.model import HookedModel, Hooks, check_attention_reads, native_attention, runner_of
from dps_lens.model.positions import check_switch
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.work import Engine

MIN_RECALLED = 10
_RECALL = 0.5
_EXTRA_STEPS = 8


class Needle(NamedTuple):
    """A sentence to be found again: `sentence` ends with `answer` and a full stop."""

    sentence: str
    question: str
    answer: str

    @property
    def stem(self) -> str:
        """What stands before the answer; the model's reply is begun with it."""
        return self.sentence[: self.sentence.rindex(self.answer)].rstrip()


@cache
def _shipped() -> dict[str, Any]:
    return json.loads(files("dps_lens.families").joinpath("haystack.json").read_text(encoding="utf-8"))


def shipped_paragraphs() -> tuple[str, ...]:
    """Neutral prose that comes with the package."""
    return tuple(_shipped()["paragraphs"])


def shipped_needles() -> tuple[Needle, ...]:
    """Needles that come with the package."""
    return tuple(Needle(**needle) for needle in _shipped()["needles"])


@dataclass(frozen=True)
class Retrieval:
    """Copying out of context: the share of the needle's tokens that a head copies (Wu et al. 2024).

    A head copies a token at a decoding step when its attention is largest at a token of the needle's
    answer and this token is generated. The score of a run is the number of different tokens of the
    answer that the head copies, over their number; runs count in which the answer was recalled (ROUGE-1
    recall over 0.5). Above 0.1 the paper speaks of a retrieval head.

    The prompt holds the haystack, the needle's sentence at a depth of it, and the question; the reply is
    begun with the sentence's first words, so that small and base models answer, too. Lengths are tried in
    rising order up to the first at which nothing is recalled.

    Attributes:
        lengths: tokens of the prompt; those that do not fit the model's context are left out, and one that
            fills it is shortened by the reply.
        depths: where the needle stands, 0 to 1.
        needles: by default those of the package.
        haystack: paragraphs of text; by default those of the package.
    """

    name: ClassVar[str] = "retrieval"
    unit: ClassVar[str] = "share of the answer copied"

    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    needles: tuple[Needle, ...] = field(default_factory=lambda: shipped_needles()[:4])
    haystack: tuple[str, ...] = field(default_factory=shipped_paragraphs)

    def settings(self) -> dict[str, Any]:
        """What decides the scores, for a manifest."""
        return {
            "lengths": self.lengths,
            "depths": self.depths,
            "needles": [needle._asdict() for needle in self.needles],
            "haystack": self.haystack,
        }

    def measure(self, model: HookedModel, key: str, given: object = None) -> dict[str, Tensor]:
        """One needle: `copied [layer head]`; empty where it was not recalled."""
        length, number, place = map(int, key.split("|"))
        copied = _run(model, self.haystack, self.needles[number], length, self.depths[place])
        return {} if copied is None else {"copied": copied}

    def score(
        self,
        model: HookedModel,
        *,
        folder: RunFolder | None = None,
        engine: Engine | None = None,
        progress: bool = True,
    ) -> HeadScores:
        """Scores `[recalled run, layer, head]`; NaN with a reason where fewer than 10 runs recalled."""
        values, ids, tried = [], [], {}
        work = FamilyWork(model, self)
        for length in sorted(length for length in self.lengths if length <= model.cfg.n_ctx):
            places = [(number, place) for number in range(len(self.needles)) for place in range(len(self.depths))]
            keys = {f"{length}|{number}|{place}": (number, place) for number, place in places}
            what = f"needles in {length} tokens"
            found = work.run(list(keys), folder=folder, engine=engine, what=what, unit="run", progress=progress)
            recalled = [key for key, unit in found.items() if unit]
            for key in recalled:
                number, place = keys[key]
                values.append(found[key]["copied"])
                ids.append(f"needle {number}, {length} tokens, depth {self.depths[place]}")
            tried[str(length)] = f"{len(recalled)} of {len(keys)}"
            if not recalled:
                break
        manifest: dict[str, Any] = {"recalled": tried, **work.left_out}
        if len(values) < MIN_RECALLED:
            manifest["reason"] = f"{len(values)} needles were recalled ({tried}); {MIN_RECALLED} are needed"
            values, ids = [torch.full((model.cfg.n_layers, model.cfg.n_heads), torch.nan)], ["none"]
        return HeadScores(torch.stack(values), example_ids=ids, user_ids=ids, manifest=manifest)


@torch.inference_mode()
def _run(
    model: HookedModel, haystack: Sequence[str], needle: Needle, length: int, depth: float
) -> Float[Tensor, "layer head"] | None:
    """One needle: copy score of every head, or None where the needle was not recalled."""
    check_attention_reads("reference_heads", model)
    cfg, runner = model.cfg, runner_of(model)
    steps = len(PromptTokenizer(model).answer(needle.answer, None)) + _EXTRA_STEPS
    ids, (start, stop) = needle_prompt(model, haystack, needle, min(length, cfg.n_ctx - steps), depth)
    tokens = torch.tensor([ids], device=runner.device)
    most = torch.zeros(cfg.n_layers, cfg.n_heads, dtype=torch.long)

    def note(pattern: Tensor, hook: object, layer: int) -> None:
        most[layer] = pattern[0, :, -1].argmax(-1).cpu()

    check_switch(model, "reference_heads", len(ids) - 1, len(ids) + steps - 1)
    hooks = [(f"blocks.{layer}.attn.hook_pattern", partial(note, layer=layer)) for layer in range(cfg.n_layers)]
    reading = Hooks(model, hooks)
    with native_attention(model):
        prompt = runner.prefill(tokens[:, :-1])
    cache = runner.start_decoding(prompt, torch.tensor([0]))
    copied = torch.zeros(stop - start, cfg.n_layers, cfg.n_heads, dtype=torch.bool)
    token, mask, ends = tokens[:, -1:], torch.ones_like(tokens), end_tokens(model)
    written: list[int] = []
    for _ in range(steps):
        with reading:
            logits = runner.step(token, cache, mask)
        if not bool(torch.isfinite(logits).all()):
            raise ScoreError("reference_heads: logits are NaN or infinite; check_model(model) looks at the weights")
        token = logits.argmax(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        written.append(int(token))
        for position in range(start, stop):
            if ids[position] == written[-1]:
                copied[position - start] |= most == position
        if written[-1] in ends:
            break
    if _recall(needle.answer, model.tokenizer.decode(written, skip_special_tokens=True)) <= _RECALL:
        return None
    return copied.float().mean(0)


def needle_prompt(
    model: HookedModel, haystack: Sequence[str], needle: Needle, length: int, depth: float
) -> tuple[list[int], tuple[int, int]]:
    """Token ids of at most `length` tokens, and where in them the needle's answer stands.

    Raises:
        ScoreError: the haystack is too short, or the length leaves no room for it.
    """
    tokenizer = PromptTokenizer(model)
    sentences = [sentence.strip() + "." for text in haystack for sentence in text.rstrip(". ").split(". ")]
    lead = tokenizer.answer(needle.stem, None)

    def build(count: int) -> tuple[list[int], tuple[int, int]]:
        before = sentences[: round(depth * count)]
        text = " ".join([*before, needle.sentence, *sentences[len(before) : count]])
        rendered, offset = tokenizer.render(tokenizer.defuse(f"{text}\n\n{needle.question}"))
        ids, offsets = tokenizer.encode(rendered)
        begin = rendered.index(needle.sentence, offset) + needle.sentence.rindex(needle.answer)
        return ids + lead, _overlapping(offsets, begin, begin + len(needle.answer))

    low, high = 1, len(sentences)
    if len(build(low)[0]) > length:
        raise ScoreError(f"retrieval: {length} tokens leave no room for a haystack")
    if len(build(high)[0]) <= length:
        raise ScoreError(f"retrieval: the haystack is shorter than {length} tokens; give more text or shorter lengths")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(build(middle)[0]) <= length else (low, middle)
    return build(low)


def _overlapping(offsets: Offsets, begin: int, end: int) -> tuple[int, int]:
    inside = [index for index, offset in enumerate(offsets) if offset and offset[0] < end and offset[1] > begin]
    return inside[0], inside[-1] + 1


def _recall(answer: str, text: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"]).score(answer, text)["rouge1"].recall
