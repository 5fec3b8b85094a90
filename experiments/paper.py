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
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

import dps_lens as dps
from dps_lens.cli.engines import engine_of, load_for
from dps_lens.errors import DataError
from dps_lens.files import write_text
from dps_lens.stats.intervals import columns
from dps_lens.work import Engine
from experiments.lib.budget import budget, memory
from experiments.lib.choices import (
    AS_PUBLISHED,
    CAD,
    DECORE,
    DOLA,
    FOUND,
    RAG,
    RANDOM,
    RANDOM_MASKS,
    RIGHT,
    Paper,
    Task,
)
from experiments.lib.harness import Claim, Findings, Lab, above_zero, verdicts, write
from experiments.lib.held_out import shown
from experiments.lib.published import PUBLISHED
from experiments.lib.tables import ends, markdown

AS_IN_PAPER = {CAD: "CAD", DOLA: "DoLa", DECORE: "DeCoRe", AS_PUBLISHED: "DPS"}
PAPERS_MODEL = "Llama-3-8B-Instruct, published"


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
        if len(done.costs):
            tables[f"{name}, a token"] = of_a_token(done)
        claims += decided(done, name, 1 - 0.05 / (4 * len(config.tasks)))
        if FOUND in task.names:
            task.found.publish(task.out / "atlas")
    return Findings(tables, claims)


def worth(done: dps.Evaluation, task: str) -> pd.DataFrame:
    """Metrics of every method with intervals, the difference of the first to the profile alone, and the published one.

    CAD as published contrasts with a prompt that still holds the context: its row is that of greedy decoding.
    """
    names = list(done.manifest["metrics"])
    better = "" if done.metric(names[0]).sign > 0 else ", lower is better"
    frame, to_rag = done.to_frame(), done.differences(RAG, metrics=names[:1])
    rows: dict[str, dict[str, Any]] = {}
    for method in done.methods:
        of = frame[(frame["method"] == method) & frame["metric"].isin(names)]
        if not len(of):
            continue
        row: dict[str, Any] = {"method": method, "users": done.rows["user"].nunique()}
        for one in of.to_dict("records"):
            row |= columns(str(one["metric"]), ends(one))
        other = to_rag[to_rag["method"] == method]
        row |= columns(f"{names[0]} to {RAG}{better}", ends(other.iloc[0])) if len(other) else {}
        rows[method] = row
        if method == RAG:
            rows[CAD] = row | {"method": f"{CAD} as published, which is {RAG}"}
    for method, in_paper in AS_IN_PAPER.items():
        for metric, value in PUBLISHED.get(task, {}).get(in_paper, {}).items():
            if method in rows and metric in names:
                rows[method] |= {f"{metric}, {PAPERS_MODEL}": value}
    return pd.DataFrame(rows.values())


def of_a_token(done: dps.Evaluation) -> pd.DataFrame:
    """What a token of every method takes, the prompt included, and that as a multiple of the profile alone."""
    costs = done.costs.set_index("method")
    return costs.assign(**{f"{name}, of {RAG}": costs[name] / costs.loc[RAG, name] for name in costs}).reset_index()


def decided(done: dps.Evaluation, task: str, level: float) -> list[Claim]:
    """The hypotheses of one task, with intervals of this level."""
    metric = done.metrics[0]
    sign = done.metric(metric).sign
    claims = []
    for better, than in ((AS_PUBLISHED, RAG), (AS_PUBLISHED, RANDOM_MASKS), (RIGHT, RAG), (RIGHT, RANDOM)):
        row = done.differences(than, level, metrics=[metric]).set_index("method").loc[better]
        mean, low, high = (sign * row[name] for name in ("mean", "low", "high"))
        found = {"mean": mean, "low": min(low, high), "high": max(low, high)}
        claims.append(above_zero(f"{task}: {better} is better by {metric} than {than}", found))
    return claims


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
