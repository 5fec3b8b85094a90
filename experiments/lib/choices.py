"""One task of the paper's tables: its users, the heads that each published choice names, and what they do.

`LADDER` leads from the published method to the one done right, one choice at a time.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

import dps_lens as dps
from dps_lens.data import User
from dps_lens.evaluation.methods import Asked
from dps_lens.selection import random_sets
from dps_lens.work import Engine
from experiments.lib.harness import Config, Lab, Prompts, located
from experiments.lib.held_out import papers
from experiments.lib.output_slices import score_slices

RAG, CAD, DOLA, DECORE = "rag", "CAD", "DoLa", "DeCoRe"
AS_PUBLISHED, RANDOM_MASKS = "DPS as published", "DPS as published, random masks"
HEADS, CONTRAST, OLDER = "1. heads, not slices", "2. less without a profile", "3. older examples"
OTHERS, ZEROED, RIGHT = "4. chosen by other users", "5. heads zeroed", "6. γ fixed: DPS"
RANDOM, REAL_CAD = "DPS, random heads", "CAD, real contrast"
FOUND, VECTORS = "DPS, found heads", "head vectors"
LADDER = (AS_PUBLISHED, HEADS, CONTRAST, OLDER, OTHERS, ZEROED, RIGHT)
METHODS = ("plain", RAG, DOLA, DECORE, *LADDER, RANDOM_MASKS, RANDOM, REAL_CAD, FOUND, VECTORS)
OF_HISTORY = (OLDER, FOUND, VECTORS)
LABELLED = ("lamp-1", "lamp-7")
"""Histories of these hold no pairs: heads are chosen on the labelled questions of other users, and nothing is found or
made of a user."""


class Paper(Config):
    """What the tables are made of."""

    prompt: Prompts = Prompts(items=5, profile_tokens=1536, task_tokens=384, response_tokens=96)
    tasks: tuple[str, ...] = ("lamp-1", "lamp-2", "lamp-3", "lamp-4", "lamp-5", "lamp-7")
    data: dict[str, str] = Field(default_factory=dict)
    device: str | None = None
    dtype: str = "auto"
    share: float = 0.04
    gamma: float = 0.5
    score_examples: int = 1
    answered: int | None = None
    new_tokens: int | None = None
    n_random: int = 50
    finder: Literal["gates", "rank"] = "rank"
    vector_examples: int = 4


class Task:
    """One task: its users, the heads of every choice, and what they do."""

    def __init__(self, name: str, config: Paper, lab: Lab, engine: Engine | None) -> None:
        self.name, self.config, self.lab, self.engine = name, config, lab, engine
        self.out, self.model = lab.out / name, lab.model
        self.labelled = dps.ScoreConfig(discovery="labelled")
        self.older = self.labelled if name in LABELLED else dps.ScoreConfig()
        self.k = max(1, round(config.share * self.model.cfg.n_layers * self.model.cfg.n_heads))

    @cached_property
    def users(self) -> list[User]:
        """Those with a held-out example, and with older ones where the task's histories hold any."""
        source = self.config.data.get(self.name)
        found = dps.load_users(
            located(source) if source else dps.fetch(self.name), max_users=self.config.max_users, task=self.name
        )
        found = [one for one in found if one.examples and (self.name in LABELLED or one.discovery_examples())]
        self.lab.read[self.name] = [user.id for user in found]
        return found

    @property
    def names(self) -> list[str]:
        """Methods that answer, where the model shows retrieval heads."""
        return [name for name in METHODS if self.name not in LABELLED or name not in OF_HISTORY]

    def slices(self) -> dps.HeadSet:
        """The output slices that the published detector calls heads: the paper's PCS on the tested examples."""
        found = score_slices(
            self.model,
            self.users,
            prompt_config=self.config.prompt.config(),
            max_examples=self.config.score_examples,
            against=None,
            score_config=self.labelled,
            out=self.out / "slices",
            engine=self.engine,
        )
        return found.top(self.k)

    def heads(self, tested: bool) -> dps.HeadScores:
        """PCS of true heads, what they do with the profile less without."""
        return dps.score_heads(
            self.model,
            self.users,
            ablation="zero",
            against="no_profile",
            method="exact",
            max_examples=self.config.score_examples,
            prompt_config=self.config.prompt.config(),
            score_config=self.labelled if tested else self.older,
            out=self.out / f"heads-{'tested' if tested else 'older'}",
            engine=self.engine,
        )

    @cached_property
    def ours(self) -> dict[str, dps.HeadSet]:
        """For each user, the heads that the others chose on older examples."""
        scores = self.heads(tested=False)
        return {user.id: scores.without({user.id}).top(self.k) for user in self.users}

    @cached_property
    def found(self) -> dps.FoundHeads:
        return dps.find_heads(
            self.model,
            self.users,
            self.k,
            method=self.config.finder,
            max_task_cost=None,
            max_neutral_cost=None,
            max_examples=self.config.score_examples,
            prompt_config=self.config.prompt.config(),
            find_config=dps.FindConfig(n_bootstraps=0, discovery=self.older.discovery),
            out=self.out / "found",
            engine=self.engine,
        )

    @cached_property
    def families(self) -> dict[str, Any]:
        """Sets of heads by the choices that made them; without older examples there is one choice less."""
        tested = self.heads(tested=True)
        families = {AS_PUBLISHED: self.slices(), HEADS: papers(tested).top(self.k), CONTRAST: tested.top(self.k)}
        if self.name in LABELLED:
            return families | {OTHERS: self.ours}
        return families | {OLDER: self.heads(tested=False).top(self.k), OTHERS: self.ours, FOUND: self.found}

    def random(self, of: Mapping[str, dps.HeadSet]) -> dict[str, dps.HeadSet]:
        """Another set of the same layers for each user."""
        every = enumerate(of.items())
        return {user: random_sets(self.model, one, [n], self.config.seed)[0] for n, (user, one) in every}

    def methods(self) -> dict[str, Asked]:
        """From the published method to the one done right, one choice at a time."""
        families, uniform = self.families, "decore"  # uniform attention, strength by entropy
        published = {user.id: families[AS_PUBLISHED] for user in self.users}
        methods: dict[str, Asked] = {"plain": "plain", RAG: RAG, DOLA: "dola"}
        retrieval = self.lab.references(("retrieval",), self.engine).get("retrieval")
        if retrieval is not None:
            methods[DECORE] = ("decore", retrieval.top(self.k))
        methods |= {AS_PUBLISHED: (uniform, published), RANDOM_MASKS: (uniform, self.random(published))}
        methods |= {name: (uniform, families[name]) for name in (HEADS, CONTRAST, OLDER, OTHERS) if name in families}
        methods |= {ZEROED: ("dps-entropy", self.ours), RIGHT: ("dps", self.ours)}
        methods |= {RANDOM: ("dps", self.random(self.ours)), REAL_CAD: "cad"}
        if FOUND in families:
            methods |= {FOUND: ("dps", self.found), VECTORS: ("rag+head_vector", self.found)}
        return methods

    def evaluated(self) -> dps.Evaluation:
        # What a token takes is measured on one task, the first on which all methods answer.
        tasks = self.config.tasks
        timed = self.name == next((one for one in tasks if one not in LABELLED), tasks[0])
        config = dps.EvaluateConfig(choose_on=0, vector_examples=self.config.vector_examples, costs=timed)
        return dps.evaluate(
            self.model,
            self.users,
            self.methods(),
            strengths=(self.config.gamma,),
            ks=(self.k,),
            max_examples=self.config.answered,
            max_new_tokens=self.config.new_tokens,
            prompt_config=self.config.prompt.config(),
            evaluate_config=config,
            seed=self.config.seed,
            out=self.out / "answers",
            engine=self.engine,
        )

    def effects(self) -> dps.SetEffects:
        """What removing the heads takes of the gain, and costs otherwise, beside random sets."""
        chosen = {name: of for name, of in self.families.items() if name in (AS_PUBLISHED, OTHERS, FOUND)}
        return dps.ablation_curve(
            self.model,
            self.users,
            chosen,
            ks=(self.k,),
            n_random=self.config.n_random,
            max_examples=1,
            ablation="zero",
            held_out_config=dps.HeldOutConfig(patched=False),
            seed=self.config.seed,
            prompt_config=self.config.prompt.config(),
            out=self.out / "ablated",
            engine=self.engine,
        )
