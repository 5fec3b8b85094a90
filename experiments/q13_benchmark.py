"""Who writes most like the user? Every method on held-out headlines, posts and abstracts, settings chosen beforehand.

    python -m experiments.q13_benchmark [--config FILE.yaml] [--out runs/benchmark]

Question. Which way of decoding writes texts nearest to the user's own, and at what cost?

Hypotheses, put into this form when the numbers were known, for headlines, posts and abstracts each. (1) DPS with
Preference Heads writes nearer to the user's text than the profile alone. (2) It does so more than with random heads.

Measure. Greedy answers: headlines, the newest 2 of each blogger, 24 tokens; posts, the newest of each blogger, and
abstracts, one of each of 16 authors, 48 tokens. ROUGE and METEOR with what the user wrote, style (similarity to the
user's other texts less that to other users'), NLL under the unsteered model, repetition; seconds and FLOPs a token,
`rag` being 1. 10 heads, chosen by other users as in q11_families. Strength 0.25 or 1, and for vectors layer 10 or 15,
are chosen on one discovery example a user; vectors and LoRAs are made of the newest 4.

Control. Random heads of the same layers, another set for each user; the profile alone (`rag`), the task alone
(`plain`), and what the user wrote (`reference`).

Decision rule. By the 95% interval over users of the paired difference of the first metric to (1) `rag`, (2) random
heads: supported above 0, not supported below or at 0, else undecided.
"""

from typing import Any, Literal

import pandas as pd
from pydantic import Field

import dps_lens as dps
from dps_lens.evaluation.methods import Asked
from dps_lens.selection import HeadSource, random_sets
from dps_lens.stats.intervals import columns
from experiments.lib.harness import LONG, Claim, Config, Findings, Lab, Prompts, above_zero, main
from experiments.lib.tables import ends

DPS, RANDOM, RAG = "dps, Preference Heads", "dps, random heads", "rag"
THAN = {RAG: "the profile alone", RANDOM: "DPS with random heads"}
NAMED = ("plain", RAG, "prompt", "cad", "dola")
MADE = ("stylevector", "rag+stylevector", "steerx", "rag+steerx", "lora", "rag+lora")
Corpus = Literal["headlines", "posts", "abstracts"]


class Benchmark(Config):
    prompt: Prompts = LONG
    steps: tuple[Corpus, ...] = ("headlines", "abstracts", "posts")
    posts: str = "govblog/longlamp_topic.jsonl"
    abstracts: str = "acl/longlamp_abstract.jsonl"
    max_authors: int = 16
    kinds: tuple[str, ...] = ("induction", "retrieval")
    k: int = 10
    strengths: tuple[float, ...] = (0.25, 1.0)
    layers: tuple[int, ...] = (10, 15)
    vector_examples: int = 4
    answered: dict[Corpus, int] = Field({"headlines": 2, "posts": 1, "abstracts": 1})
    new_tokens: dict[Corpus, int] = Field({"headlines": 24, "posts": 48, "abstracts": 48})


def measure(config: Benchmark, lab: Lab) -> Findings:
    tables: dict[str, pd.DataFrame] = {}
    times: dict[str, pd.DataFrame] = {}
    claims: list[Claim] = []
    for corpus in config.steps:
        done = evaluated(corpus, config, lab)
        against = {baseline: done.differences(baseline) for baseline in THAN}
        tables |= {corpus: worth(done, against[RAG]), f"{corpus}, chosen": chosen(done)}
        times[f"{corpus}, costs"] = costs(done)
        for baseline, than in THAN.items():
            found = against[baseline].set_index(["method", "metric"]).loc[(DPS, done.metrics[0])]
            claims.append(above_zero(f"{corpus}: DPS with Preference Heads is nearer to the user than {than}", found))
    return Findings(tables, claims, times)


def evaluated(corpus: Corpus, config: Benchmark, lab: Lab) -> dps.Evaluation:
    """All methods on one corpus; users with too few discovery examples for a style vector are left out."""
    if corpus == "abstracts":
        users = lab.users(config.abstracts, max_users=config.max_authors)
        scores = lab.scores(users, max_examples=1)
    else:
        bloggers = lab.users()
        scores = lab.scores(bloggers)
        users = bloggers if corpus == "headlines" else lab.users(config.posts)
    users = [user for user in users if len(user.discovery_examples()) > 1]
    refs = {name: of.top(config.k) for name, of in lab.references(config.kinds).items()}
    ours = {user.id: scores.without({user.id}).top(config.k) for user in users}
    drawn = {user: random_sets(lab.model, of, [n], config.seed)[0] for n, (user, of) in enumerate(ours.items())}
    heads: dict[str, HeadSource] = {**refs, "Preference Heads": ours, "random heads": drawn}
    methods: dict[str, Asked] = {**dict(zip(NAMED, NAMED, strict=True))}
    methods |= {f"dps, {name}": ("dps", of) for name, of in heads.items()}
    methods |= {f"{rule}, Preference Heads": (rule, ours) for rule in ("dps-entropy", "amplify", "dps+cad")}
    methods |= {"decore, retrieval": ("decore", refs["retrieval"])} if "retrieval" in refs else {}
    methods |= dict(zip(MADE, MADE, strict=True))
    settings: dict[str, Any] = {"strengths": config.strengths, "ks": (config.k,), "seed": config.seed}
    settings |= {"max_examples": config.answered[corpus], "max_new_tokens": config.new_tokens[corpus]}
    evaluate_config = dps.EvaluateConfig(layers=config.layers, vector_examples=config.vector_examples)
    prompts, out = config.prompt.config(), lab.out / corpus
    return dps.evaluate(
        lab.model, users, methods, **settings, prompt_config=prompts, evaluate_config=evaluate_config, out=out
    )


def worth(done: dps.Evaluation, to_rag: pd.DataFrame) -> pd.DataFrame:
    """Metrics of every method with intervals, and differences to `rag` of the first metric and of style."""
    names = [name for name in done.metrics if name != "tokens"]
    parts = ((done.to_frame(), "", names), (to_rag, f" to {RAG}", (names[0], "style")))
    rows: dict[str, dict[str, Any]] = {method: {"method": method} for method in done.methods}
    for frame, ending, wanted in parts:
        for row in frame[frame["metric"].isin(wanted)].to_dict("records"):
            rows[row["method"]] |= columns(f"{row['metric']}{ending}", ends(row))
    return pd.DataFrame(rows.values())


def costs(done: dps.Evaluation) -> pd.DataFrame:
    """Relative to `rag`."""
    found = done.costs.set_index("method")
    return (found / found.loc[RAG]).reset_index()


def chosen(done: dps.Evaluation) -> pd.DataFrame:
    """What was chosen, and the grid's range on discovery examples."""
    metric, rows = done.metrics[0], []
    for method, grid in done.choices.groupby("method", sort=False):
        if len(grid) > 1:
            best = grid[grid["chosen"]].iloc[0]
            row = {"method": method, "chosen": best["setting"], f"{metric} on discovery": best[metric]}
            rows.append(row | {"least in the grid": grid[metric].min(), "settings": len(grid)})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main("benchmark", __doc__ or "", Benchmark, measure)
