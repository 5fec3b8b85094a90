"""The paper's tables (arXiv 2604.22345) for one model: the published method as its code does it, beside it done right.

    python -m experiments.paper --model meta-llama/Meta-Llama-3-8B-Instruct --tasks lamp-4,lamp-5 --out runs/paper
    python -m experiments.paper --config experiments/configs/paper_llama3.yaml

Data are fetched where the config names no file. The budget is printed first, from a sweep and an answer that are timed;
`--budget` stops there. A run that is started again resumes; `--ray` makes its units on many GPUs.

Question. Does contrasting with a model without Preference Heads write better personal texts than the profile alone, and
which of the published choices makes how much of it?

Hypotheses, each on every task. (1) DPS as published is better than the profile alone. (2) It is better than the same
with random masks (whose heads were not chosen on the tested examples, so that a win may be leakage). (3) DPS done
right is better than the profile alone. (4) It is better than with random heads.

Measure. Greedy answers to held-out examples, profiles of 5 documents by BM25, K = 4% of the heads; the metrics of the
task. *As published*: slices of the output of `o_proj` are scored with the profile, on the examples that are evaluated;
attention of the masked model is uniform; γ is the entropy; the contrast of CAD still holds the context, so that its row
is greedy decoding. *Done right*: heads at `hook_z`, scored with the profile less without, on older examples, by other
users; zero ablation, γ fixed beforehand; and what this toolkit finds and adds, `find_heads` and head vectors. From the
one to the other one choice is changed at a time. Both act from the last prompt token on; the published model is masked
everywhere. What removing the heads takes of the gain and costs otherwise is measured teacher-forced.

Control. Random masks and random heads of the same layers, another set for each user, for answers; 50 random sets for
the effects. The profile alone (`rag`), the task alone (`plain`).

Decision rule. By the interval over users of the paired difference of the task's first metric, 95% corrected for the
number of hypotheses (four a task): supported where the first is better, not supported where it is worse or the same,
else undecided.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import yaml
from pydantic import Field

import dps_lens as dps
from dps_lens.cli.engines import engine_of, load_for
from dps_lens.data import User
from dps_lens.data.conditions import prompts_in
from dps_lens.errors import DataError
from dps_lens.evaluation.methods import Asked
from dps_lens.files import write_text
from dps_lens.model import runner_of
from dps_lens.scoring import CleanRun, single_heads
from dps_lens.selection import random_sets
from dps_lens.stats.intervals import columns
from dps_lens.work import Engine
from experiments.lib.harness import Claim, Config, Findings, Lab, Prompts, above_zero, located, verdicts, write
from experiments.lib.held_out import papers, shown
from experiments.lib.output_slices import score_slices
from experiments.lib.published import PUBLISHED
from experiments.lib.tables import ends, markdown

RAG, CAD, DOLA, DECORE = "rag", "CAD", "DoLa", "DeCoRe"
AS_PUBLISHED, RANDOM_MASKS = "DPS as published", "DPS as published, random masks"
HEADS, CONTRAST, OLDER = "1. heads, not slices", "2. less without a profile", "3. older examples"
OTHERS, ZEROED, RIGHT = "4. chosen by other users", "5. heads zeroed", "6. γ fixed: DPS"
RANDOM, REAL_CAD = "DPS, random heads", "CAD, real contrast"
FOUND, VECTORS = "DPS, found heads", "head vectors"
AS_IN_PAPER = {CAD: "CAD", DOLA: "DoLa", DECORE: "DeCoRe", AS_PUBLISHED: "DPS"}
METHODS, PAPERS_MODEL = 15, "Llama-3-8B-Instruct, published"
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
        config = dps.EvaluateConfig(choose_on=0, vector_examples=self.config.vector_examples)
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


def measure(config: Paper, lab: Lab, engine: Engine | None) -> Findings:
    tables: dict[str, pd.DataFrame] = {}
    claims: list[Claim] = []
    for name in config.tasks:
        task = Task(name, config, lab, engine)
        done = task.evaluated()
        tables[name] = worth(done, name)
        tables[f"{name}, removed"] = shown(
            task.effects(), ("gain_removed", "gain_removed_other", "task_cost", "neutral_cost")
        )
        claims += decided(done, name, 1 - 0.05 / (4 * len(config.tasks)))
        if FOUND in task.families:
            task.found.publish(task.out / "atlas")
    return Findings(tables, claims)


def worth(done: dps.Evaluation, task: str) -> pd.DataFrame:
    """Metrics of every method with intervals, the difference of the first to the profile alone, and the published one.

    CAD as published contrasts with a prompt that still holds the context: its row is that of greedy decoding.
    """
    names = list(done.manifest["metrics"])
    better = "" if done.metric(names[0]).sign > 0 else ", lower is better"
    frame, to_rag = done.to_frame(), done.differences(RAG)
    rows: dict[str, dict[str, Any]] = {}
    for method in done.methods:
        of = frame[(frame["method"] == method) & frame["metric"].isin(names)]
        if not len(of):
            continue
        row: dict[str, Any] = {"method": method, "users": done.rows["user"].nunique()}
        for one in of.to_dict("records"):
            row |= columns(str(one["metric"]), ends(one))
        other = to_rag[(to_rag["method"] == method) & (to_rag["metric"] == names[0])]
        row |= columns(f"{names[0]} to {RAG}{better}", ends(other.iloc[0])) if len(other) else {}
        rows[method] = row
        if method == RAG:
            rows[CAD] = row | {"method": f"{CAD} as published, which is {RAG}"}
    for method, in_paper in AS_IN_PAPER.items():
        for metric, value in PUBLISHED.get(task, {}).get(in_paper, {}).items():
            if method in rows and metric in names:
                rows[method] |= {f"{metric}, {PAPERS_MODEL}": value}
    return pd.DataFrame(rows.values())


def decided(done: dps.Evaluation, task: str, level: float) -> list[Claim]:
    """The hypotheses of one task, with intervals of this level."""
    metric = done.metrics[0]
    sign = done.metric(metric).sign
    claims = []
    for better, than in ((AS_PUBLISHED, RAG), (AS_PUBLISHED, RANDOM_MASKS), (RIGHT, RAG), (RIGHT, RANDOM)):
        row = done.differences(than, level).set_index(["method", "metric"]).loc[(better, metric)]
        mean, low, high = (sign * row[name] for name in ("mean", "low", "high"))
        found = {"mean": mean, "low": min(low, high), "high": max(low, high)}
        claims.append(above_zero(f"{task}: {better} is better by {metric} than {than}", found))
    return claims


def budget(config: Paper, lab: Lab) -> pd.DataFrame:
    """What each task will take, from one sweep and one answer that are timed here; nothing where only workers hold the
    model."""
    rows = []
    if lab.model.W_U.device.type == "meta":
        return pd.DataFrame(columns=["task", "hours"])
    for name in config.tasks:
        task = Task(name, config, lab, None)
        users = task.users
        if not users:
            raise DataError(f"paper: no user of {name} has both older and held-out examples; raise max_users")
        cfg, prompt = lab.model.cfg, config.prompt.config()
        (own,) = prompts_in(lab.model, users[0].examples[-1], "own", users, config=prompt)
        runner, n_heads = runner_of(lab.model), cfg.n_layers * cfg.n_heads
        run = CleanRun(runner, own)
        clean = _seconds(partial(CleanRun, runner, own))
        one_a_layer = single_heads(cfg.n_layers, cfg.n_heads)[:: cfg.n_heads]
        head = _seconds(partial(run.ablated, one_a_layer)) / cfg.n_layers
        few = dps.DecodeConfig(stop_at_eos=False)
        write_ = partial(dps.generate, lab.model, own, heads=dps.HeadSet([(0, 0)]), decode_config=few)
        first = _seconds(partial(write_, max_new_tokens=1))
        token = (_seconds(partial(write_, max_new_tokens=9)) - first) / 8
        examples = sum(min(len(user.examples), config.answered or len(user.examples)) for user in users)
        length, n_methods = config.new_tokens or users[0].task.max_new_tokens, METHODS - 3 * (name in LABELLED)
        # Slices with the profile; heads with and without, on tested and on older examples; finding, about as long.
        sweeps = 1 + 2 if name in LABELLED else 1 + 2 + 2 + 2
        scoring = len(users) * config.score_examples * sweeps * (clean + n_heads * head)
        answering = examples * n_methods * (first + length * token)
        # A set begins at its lowest layer: it takes about twice as long as a head does on average.
        removing = len(users) * 4 * (clean + 2 * head * 3 * (1 + config.n_random))
        rows.append(
            {
                "task": name,
                "users": len(users),
                "answers": examples,
                "a head, ms": head * 1e3,
                "token, ms": token * 1e3,
                "hours": (scoring + answering + removing) / 3600,
                "disk, MB": (len(users) * sweeps * 4 * n_heads + examples * n_methods * 8 * length) / 1e6,
            }
        )
    return pd.DataFrame(rows)


def _seconds(run: Any) -> float:
    """Of a second call, the first warms up."""

    def ended() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    run()
    begun = ended()
    run()
    return ended() - begun


def memory(lab: Lab) -> str:
    """What the timed sweep held."""
    weights = sum(one.numel() * one.element_size() for one in lab.model.parameters()) / 2**30
    if not torch.cuda.is_available():
        return f"{weights:.1f} GiB of weights"
    return f"{weights:.1f} GiB of weights, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most on the GPU"


def report(findings: Findings, spent: pd.DataFrame, lab: Lab) -> str:
    """One page: what was found, the tables, the budget."""
    config = lab.config
    assert isinstance(config, Paper)
    parts = [f"# The paper's tables, {config.model}", markdown(verdicts(findings.claims))]
    parts += [f"## {name}\n\n{markdown(frame)}" for name, frame in findings.tables.items()]
    about = f"dps_lens {dps.__version__}, seed {config.seed}, K = {config.share:.0%} of the heads; {memory(lab)}."
    return "\n\n".join([*parts, f"## Budget, estimated before the run\n\n{markdown(spent)}", about]) + "\n"


def read_config(arguments: argparse.Namespace) -> Paper:
    """A file of settings, with what the command line changes in it."""
    values = yaml.safe_load(arguments.config.read_text(encoding="utf-8")) if arguments.config else {}
    if unused := sorted({*(values or {})} & {"users", "max_examples", "score", "scores"}):
        raise DataError(
            f"paper: {unused[0]!r} changes nothing here; data: says where the tasks lie, score_examples: how many score"
        )
    given = {"model": arguments.model, "max_users": arguments.max_users}
    given["tasks"] = arguments.tasks.split(",") if arguments.tasks else None
    return Paper(**(values or {}) | {name: value for name, value in given.items() if value is not None})


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML; fields are those of the printed config.yaml")
    parser.add_argument("--model", help="a name on the Hub, or a folder")
    parser.add_argument("--tasks", help="lamp-1,…,lamp-7, or LongLaMP's, with their files under 'data' in the config")
    parser.add_argument("--max-users", type=int)
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--budget", action="store_true", help="say what the run would take, and stop")
    parser.add_argument("--workers", type=int, help="make the units in so many Ray workers")
    parser.add_argument("--ray", help="address of a running Ray cluster, such as auto")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a worker")
    parser.add_argument("--cpus", type=int, default=1, help="CPU cores of a worker")
    arguments = parser.parse_args(given)
    config, begun = read_config(arguments), time.monotonic()
    with engine_of(arguments.workers, arguments.ray, arguments.cpus, arguments.gpus, None) as engine:
        lab = PaperLab(config, arguments.out, engine)
        spent = budget(config, lab)
        if len(spent):
            print(markdown(spent))
            print(f"in all {spent['hours'].sum():.2f} hours of one such device, by estimate; {memory(lab)}", flush=True)
        else:
            print("the budget is timed on one device: run with --budget, and without --workers", flush=True)
        if arguments.budget:
            return
        findings = measure(config, lab, engine)
    write(findings, lab, __doc__ or "")
    write_text(arguments.out / "report.md", report(findings, spent, lab))
    for claim in findings.claims:
        print(f"{claim.outcome}: {claim.hypothesis}")
    print(f"{arguments.out}/report.md, after {(time.monotonic() - begun) / 60:.1f} minutes", file=sys.stderr)


class PaperLab(Lab):
    """With a model on the device, or in the number format, that was asked for."""

    def __init__(self, config: Paper, out: Path, engine: Engine | None) -> None:
        super().__init__(config, out)
        self._engine, self._asked = engine, config

    @cached_property
    def model(self) -> dps.HookedModel:
        return load_for(self._engine, self._asked.model, self._asked.device, self._asked.dtype)


if __name__ == "__main__":
    main()
