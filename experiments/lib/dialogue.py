"""Several turns of one user, with a profile in the first turn only, and edits at every turn of the assistant."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from dps_lens.data import Example, Prompt, PromptConfig, build_prompt
from dps_lens.data.tokenizer import PromptTokenizer, span
from dps_lens.errors import DataError, PromptError
from dps_lens.model import HookedModel
from dps_lens.model.runners import runner_of
from dps_lens.scoring import CleanRun


@dataclass(frozen=True)
class Dialogue:
    """A conversation as one prompt, whose response begins with the assistant's first turn.

    Attributes:
        prompt: what is run.
        turns: `(start, stop)` of each answer of the assistant.
    """

    prompt: Prompt
    turns: tuple[tuple[int, int], ...]

    def edited(self, n_pos: int) -> Bool[Tensor, "1 pos"]:
        """Positions whose logits give an answer: from the last token before each turn on, among the last `n_pos`."""
        begin = self.prompt.spans["response"][0] - 1
        mask = torch.zeros(1, len(self.prompt.tokens) - begin, dtype=torch.bool)
        for start, stop in self.turns:
            mask[0, start - 1 - begin : stop - begin] = True
        return mask[:, :n_pos]

    def by_turn(self, losses: Float64[Tensor, "row pos"]) -> Float64[Tensor, "turn row"]:
        """Mean loss of each answer."""
        begin = self.prompt.spans["response"][0]
        return torch.stack([losses[:, start - begin : stop - begin].mean(-1) for start, stop in self.turns])


def dialogue(model: HookedModel, examples: Sequence[Example], shown: bool, config: PromptConfig) -> Dialogue:
    """The examples of one user as turns; the profile of the first stands before its task, or nowhere.

    Raises:
        DataError: there are no examples.
        PromptError: the tokenizer has no chat template, or the conversation does not fit the context.
    """
    if not examples:
        raise DataError("dialogue: there are no turns")
    tokenizer = PromptTokenizer(model)
    if not tokenizer.chat:
        raise PromptError("dialogue: the tokenizer has no chat template")
    asked = [tokenizer.defuse(tokenizer.cut(e.input.strip(), config.task_tokens)).strip() for e in examples]
    answers = [tokenizer.inner.decode(tokenizer.answer(e.reference, config.response_tokens)).strip() for e in examples]
    first = build_prompt(model, examples[0], config=config, response=False)
    start, stop = first.spans["profile"]
    if shown:
        asked[0] = _profile_text(tokenizer, first.tokens[start:stop]) + asked[0]
    text, _ = tokenizer.render(asked[-1], list(zip(asked[:-1], answers[:-1], strict=True)))
    ids, offsets = tokenizer.encode(text)
    turns, at = [], 0
    for question, answer in zip(asked[:-1], answers[:-1], strict=True):
        at = text.index(question, at) + len(question)
        at = text.index(answer, at)
        turns.append(span(offsets, at, at + len(answer)))
        at += len(answer)
    last = tokenizer.answer(examples[-1].reference, config.response_tokens)
    turns.append((len(ids), len(ids) + len(last)))
    if turns[-1][1] > model.cfg.n_ctx:
        raise PromptError(f"dialogue: {turns[-1][1]} tokens, the model's context is {model.cfg.n_ctx}; lower the turns")
    spans = {
        "profile": (start, stop) if shown else (start, start),
        "task": (0, 0),
        "response": (turns[0][0], turns[-1][1]),
    }
    prompt = Prompt(
        torch.tensor(ids + last), spans, text, "own" if shown else "none", examples[0].id, examples[0].user_id, ()
    )
    return Dialogue(prompt, tuple(turns))


def _profile_text(tokenizer: PromptTokenizer, tokens: Tensor) -> str:
    return str(tokenizer.inner.decode(tokens)).strip() + "\n\n"


def turn_losses(
    model: HookedModel, talk: Dialogue, masks: Bool[Tensor, "row layer head"]
) -> Float64[Tensor, "turn row"]:
    """NLL of every answer with the heads of each row ablated at every turn of the assistant."""
    return talk.by_turn(CleanRun(runner_of(model), talk.prompt, where=talk.edited).ablated_losses(masks))
