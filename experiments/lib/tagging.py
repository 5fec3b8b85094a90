"""A tagging task of LaMP-2's form for the probe users: who tags a film by what?

25 invented films, written for this and never shown anywhere. Each has three of LaMP-2's tags: what happens, how it
feels, and what is remarked on it. Askers tag by the first, diarists by the second, scholars by the third, so that an
answer that does not look at the profile is right for one of three at most. Every film is held out for one user of each
habit; the user's other films are the history.

The answer is that of LaMP-2's 15 tags with the highest log-probability under steering, less the tag's mean over all
held-out films (batch calibration, arXiv 2309.17249): a small model writes none of the tags, and prefers the same one
for every film.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import dps_lens as dps
from dps_lens.data import Example, Shown, User, build_prompt
from dps_lens.evaluation import Evaluation
from dps_lens.evaluation.metrics import LABELS, metrics_of, score_text
from dps_lens.heads import HeadSet
from dps_lens.intervene import Scale
from dps_lens.model import HookedModel, native_attention
from dps_lens.model.runners import runner_of
from dps_lens.runs import RunFolder, kept
from dps_lens.scores import HeadScores
from dps_lens.selection import random_sets
from dps_lens.steering.rules import find_rule
from dps_lens.steering.terms import combine

HABITS = {"asker": "plot", "diarist": "mood", "scholar": "remark"}
TOPICS = ("bread", "bicycles", "birds", "gardens")
TAGS = LABELS["lamp-2"]
ASK = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
    f"explanation. tags: [{', '.join(TAGS)}] description: "
)


def tag_users(n_films: int | None = None) -> list[User]:
    """The 12 probe users as taggers of films, from LaMP-2 records."""
    text = Path(__file__).with_name("films.jsonl").read_text(encoding="utf-8")
    films = [json.loads(line) for line in text.splitlines()][:n_films]
    records = []
    for style, habit in HABITS.items():
        own = [{"id": film["id"], "tag": film[habit], "description": film["description"]} for film in films]
        for deal, topic in enumerate(TOPICS):
            profile = [film for number, film in enumerate(own) if number % len(TOPICS) != deal]
            for film in own[deal :: len(TOPICS)]:
                record = {"user_id": f"{style}-{topic}", "id": f"{style}-{topic}-{film['id']}", "profile": profile}
                records.append(record | {"input": ASK + film["description"], "output": film["tag"]})
    return dps.load_users(records)


class Candidates:
    """One question with each tag as its answer, in one batch."""

    def __init__(self, model: HookedModel, example: Example, profile: Shown, prompt: dps.PromptConfig) -> None:
        self.runner = runner_of(model)
        asked = [build_prompt(model, replace(example, reference=tag), profile, config=prompt) for tag in TAGS]
        question, answers = asked[0].prompt_tokens, [one.response_tokens for one in asked]
        self.n_pos = max(len(answer) for answer in answers)
        padded = [torch.nn.functional.pad(answer, (0, self.n_pos - len(answer)), value=-1) for answer in answers]
        self.targets = torch.stack(padded).to(self.runner.device)
        last = question[-1:].expand(len(TAGS), 1).to(self.runner.device)
        self.tokens = torch.cat([last, self.targets[:, :-1].clamp(min=0)], dim=1)
        with native_attention(model):
            self.cache = self.runner.prefill(question[None, :-1].to(self.runner.device))

    def logits(self, without: HeadSet | None = None) -> Float[Tensor, "tag_pos d_vocab"]:
        """Of every tag's positions, one tag after the other; also with heads ablated."""
        model, heads = self.runner.model, without or HeadSet()
        with native_attention(model), Scale(1 - heads.mask(self.runner.cfg)[None].float()).on(model):
            return self.runner.logits(self.tokens, prompt=self.cache, keep=self.n_pos).float().flatten(0, 1)

    def log_probs(self, logits: Float[Tensor, "tag_pos d_vocab"]) -> Float[Tensor, " tag"]:
        """Of every tag, the sum over its tokens."""
        targets = self.targets.flatten()
        each = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        return (each * (targets >= 0)).reshape(len(TAGS), -1).sum(-1).double().cpu()


@dataclass(frozen=True)
class Tagging:
    """DPS with so many heads, chosen by the other users or at random, beside CAD, the profile alone and none.

    Attributes:
        model: a hooked model.
        users: of `tag_users`.
        scores: of their older films.
        ks: numbers of heads.
        strengths: γ, and α of CAD.
        prompt: how prompts are built.
        seed: of the random heads.
    """

    model: HookedModel
    users: Sequence[User]
    scores: HeadScores
    ks: Sequence[int]
    strengths: Sequence[float]
    prompt: dps.PromptConfig
    seed: int = 0

    def run(self, out: Path | None = None) -> Evaluation:
        """Every held-out film, tagged by every method; finished films are read from `out`."""
        settings = {"ks": list(self.ks), "strengths": list(self.strengths), "prompt": self.prompt.to_dict()}
        manifest = {"call": "tagging", "seed": self.seed, "scores": self.scores.manifest, **settings}
        folder = RunFolder(out, manifest) if out else None
        examples = [example for user in self.users for example in user.examples]
        found = [kept(folder, example.id, partial(self.tag, example)) for example in examples]
        rows, metrics = [], metrics_of(examples[0].task)
        manifest["metrics"] = [metric.name for metric in metrics]
        for method in found[0]:
            values = torch.stack([unit[method] for unit in found])
            for example, index in zip(examples, (values - values.mean(0)).argmax(-1).tolist(), strict=True):
                row = {"user": example.user_id, "example": example.id, "method": method, "text": TAGS[index]}
                row |= {"reference": example.reference}
                rows.append(row | score_text(metrics, example.reference, TAGS[index]))
        return Evaluation(pd.DataFrame(rows), pd.DataFrame(), pd.DataFrame(), examples[0].task, manifest)

    @torch.inference_mode()
    def tag(self, example: Example) -> dict[str, Tensor]:
        """Log-probability of every tag, by method."""
        own = Candidates(self.model, example, "own", self.prompt)
        none = Candidates(self.model, example, "none", self.prompt)
        full, without = own.logits(), none.logits()
        found = {"plain": none.log_probs(without), "rag": own.log_probs(full)}
        for strength in self.strengths:
            steered = combine(find_rule("cad").terms, full, {"negative": without}, {"negative": strength})
            found[method("cad", strength)] = own.log_probs(steered)
        for k in self.ks:
            for label, heads in self.sets(example.user_id, k).items():
                edited = own.logits(heads)
                for strength in self.strengths:
                    steered = combine(find_rule("dps").terms, full, {"ablated": edited}, {"ablated": strength})
                    found[method(label, strength)] = own.log_probs(steered)
        return found

    def sets(self, user_id: str, k: int) -> Mapping[str, HeadSet]:
        """Heads that the other users choose, and random ones of the same layers."""
        heads = self.scores.without({user_id}).top(k)
        number = [user.id for user in self.users].index(user_id)
        (drawn,) = random_sets(self.model, heads, [number], self.seed)
        return {f"dps, K {k}": heads, f"dps, K {k} (random)": drawn}


def method(label: str, strength: float) -> str:
    """The name of a method in the table."""
    return f"{label}, strength {strength:g}"


def accuracies(done: Evaluation, baseline: str = "rag") -> pd.DataFrame:
    """Accuracy and macro-F1 of every method, and its difference to a baseline, with intervals over users."""
    index = ["method", "metric"]
    means, against = done.to_frame().set_index(index), done.differences(baseline).set_index(index)
    against.columns = [f"to {baseline}" if column == "mean" else f"to {baseline}_{column}" for column in against]
    return means.join(against).reset_index()
