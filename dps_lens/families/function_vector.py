"""Function-vector heads: which heads carry an in-context task (Todd et al. 2023, arXiv 2310.15213)."""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dps_lens.data import Prompt
from dps_lens.data.tokenizer import PromptTokenizer
from dps_lens.errors import ScoreError
from dps_lens.families.work import FamilyWork
from dps_lens.intervene import Mean, recording_z
from dps_lens.model import HookedModel, native_attention, runner_of
from dps_lens.runs import RunFolder
from dps_lens.scores import HeadScores
from dps_lens.scoring import CleanRun, single_heads
from dps_lens.work import Engine


class Task(NamedTuple):
    """An in-context task: a name and pairs of input and output."""

    name: str
    pairs: tuple[tuple[str, str], ...]


@cache
def shipped_tasks() -> tuple[Task, ...]:
    """The tasks that come with the package."""
    lines = files("dps_lens.families").joinpath("icl_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return tuple(Task(record["task"], tuple((a, b) for a, b in record["pairs"])) for record in records)


@dataclass(frozen=True)
class FunctionVector:
    """Average indirect effect (AIE) of a head on in-context tasks.

    `p(y | shuffled, z of the head at the last token := its task mean) − p(y | shuffled)`, where the prompt's
    examples have shuffled outputs, y is the first token of the right output, and the task mean is taken over
    prompts with the right outputs. Mean over prompts, then over tasks.

    A task counts when the model's accuracy on the right prompts is above chance by more than two standard
    errors; chance is the largest share of one first token among the task's outputs. Where no task does, the
    family is NaN.

    Attributes:
        tasks: by default those of the package.
        n_shots: examples in a prompt.
        n_trials: prompts a task, for the means and for the effects.
        seed: of the prompts.
    """

    name: ClassVar[str] = "function_vector"
    unit: ClassVar[str] = "change of probability"

    tasks: tuple[Task, ...] = field(default_factory=shipped_tasks)
    n_shots: int = 10
    n_trials: int = 25
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """What decides the scores, for a manifest."""
        return {
            "tasks": [[task.name, task.pairs] for task in self.tasks],
            "n_shots": self.n_shots,
            "n_trials": self.n_trials,
            "seed": self.seed,
        }

    def measure(self, model: HookedModel, key: str, given: Any = None) -> dict[str, Tensor]:
        """A task's mean z, `mean|task`; or, given that, the effects in one trial, `trial|index|task`."""
        kind, _, rest = key.partition("|")
        if kind == "mean":
            mean, correct = self.task_mean(model, self._task(rest))
            return {"mean": mean, "correct": torch.tensor(correct)}
        index, _, name = rest.partition("|")
        return {"effect": self.effect(model, self._task(name), int(index), given)}

    def _task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def score(
        self,
        model: HookedModel,
        *,
        folder: RunFolder | None = None,
        engine: Engine | None = None,
        progress: bool = True,
    ) -> HeadScores:
        """Scores `[trial layer head]`, grouped by task; NaN with a reason where no task is learnt.

        Raises:
            ScoreError: a task has too few pairs, or the prompts too few shots to shuffle.
        """
        accuracies, left_out = {}, []
        work = FamilyWork(model, self)
        where: dict[str, Any] = {"folder": folder, "engine": engine, "progress": progress}
        tasks = {f"mean|{task.name}": task for task in self.tasks}
        trials: dict[str, tuple[Task, int]] = {}
        for key, found in work.run(list(tasks), what="in-context tasks", unit="task", **where).items():
            task, accuracy = tasks[key], int(found["correct"]) / self.n_trials
            chance = _chance(model, task)
            accuracies[task.name] = {"accuracy": accuracy, "chance": chance}
            if accuracy <= chance + 2 * math.sqrt(chance * (1 - chance) / self.n_trials):
                left_out.append(task.name)
                continue
            own = {f"trial|{index}|{task.name}": (task, index) for index in range(self.n_trials)}
            work.inputs |= dict.fromkeys(own, found["mean"])
            trials |= own
        effects = work.run(list(trials), what="indirect effects", unit="trial", **where)
        values = [found["effect"] for found in effects.values()]
        ids = [f"{task.name} {index}" for task, index in map(trials.__getitem__, effects)]
        owners = [trials[key][0].name for key in effects]
        manifest: dict[str, Any] = {"in_context": accuracies, "left_out": left_out, **work.left_out}
        if not values:
            manifest["reason"] = f"in-context accuracy is at chance in every task ({', '.join(left_out)})"
            values, ids, owners = [torch.full((model.cfg.n_layers, model.cfg.n_heads), torch.nan)], ["none"], ["none"]
        return HeadScores(torch.stack(values), example_ids=ids, user_ids=owners, manifest=manifest)

    def prompt(self, model: HookedModel, task: Task, index: int, *, shuffled: bool = False) -> Prompt:
        """`Q: …\\nA: …` n_shots times and a last question; the response is the first token of its answer."""
        if self.n_shots < 2:
            raise ScoreError(f"function_vector: n_shots is {self.n_shots}; outputs are shuffled among at least 2")
        if len(task.pairs) <= self.n_shots:
            raise ScoreError(
                f"function_vector: task {task.name!r} has {len(task.pairs)} pairs, {self.n_shots + 1} are needed"
            )
        # Shuffled trials have their own examples: the means they are patched with come from other prompts.
        rng = random.Random(f"{self.seed}|{task.name}|{index}|{shuffled}")
        *shots, (question, answer) = rng.sample(task.pairs, self.n_shots + 1)
        outputs = [output for _, output in shots]
        if shuffled:
            outputs = _displaced(outputs, rng)
        lines = [f"Q: {shown}\nA: {output}\n\n" for (shown, _), output in zip(shots, outputs, strict=True)]
        return icl_prompt(model, "".join(lines) + f"Q: {question}\nA:", answer)

    @torch.inference_mode()
    def task_mean(self, model: HookedModel, task: Task) -> tuple[Float[Tensor, "layer head d_head"], int]:
        """Mean z at the last token of right prompts, and how many of them the model answers rightly."""
        runner, total, correct = runner_of(model), torch.zeros(()), 0
        for index in range(self.n_trials):
            prompt = self.prompt(model, task, index)
            tokens = prompt.prompt_tokens[None].to(runner.device)
            with native_attention(model), recording_z(model, lambda n_pos: slice(n_pos - 1, None)) as recorded:
                logits = runner.logits(tokens, keep=1)
            correct += int(logits[0, -1].argmax()) == int(prompt.response_tokens[0])
            total = total + torch.stack([recorded[layer][0, 0].float().cpu() for layer in sorted(recorded)])
        return total / self.n_trials, correct

    def effect(
        self, model: HookedModel, task: Task, index: int, mean: Float[Tensor, "layer head d_head"]
    ) -> Float[Tensor, "layer head"]:
        """Change of p(y) in one shuffled prompt, for every head alone."""
        prompt = self.prompt(model, task, index, shuffled=True)
        clean = CleanRun(runner_of(model), prompt, ablation=Mean(z=mean))
        nll = clean.ablated(single_heads(model.cfg.n_layers, model.cfg.n_heads))
        effects = (-nll).exp() - math.exp(-clean.nll)
        return effects.float().reshape(model.cfg.n_layers, model.cfg.n_heads)


def icl_prompt(model: HookedModel, text: str, answer: str) -> Prompt:
    """A plain text and the first token of what should follow it."""
    tokenizer = PromptTokenizer(model)
    ids = tokenizer.plain(text)
    spans = {"profile": (0, 0), "task": (0, len(ids)), "response": (len(ids), len(ids) + 1)}
    return Prompt(torch.tensor([*ids, _first_token(tokenizer, answer)]), spans, text, "none", text[-40:], "", ())


def _first_token(tokenizer: PromptTokenizer, answer: str) -> int:
    # Behind the words that precede it: some tokenizers put a space of their own before a text's first word.
    ids, offsets = tokenizer.encode(f"A: {answer}")
    return next(token for token, offset in zip(ids, offsets, strict=True) if offset and offset[1] > len("A:"))


def _displaced(outputs: Sequence[str], rng: random.Random) -> list[str]:
    """A random order in which no output keeps its place."""
    order = list(range(len(outputs)))
    while any(place == index for index, place in enumerate(order)):
        rng.shuffle(order)
    return [outputs[place] for place in order]


def _chance(model: HookedModel, task: Task) -> float:
    tokenizer = PromptTokenizer(model)
    counts = Counter(_first_token(tokenizer, output) for _, output in task.pairs)
    return max(counts.values()) / len(task.pairs)
