"""Who writes most like the user? Every method on held-out headlines, posts and abstracts, settings chosen beforehand.

    python -m experiments.benchmark --govblog DATA/govblog/lamp4_questions.json \\
        --topics DATA/govblog/longlamp_topic.jsonl --acl DATA/acl/longlamp_abstract.jsonl

Uses the scores and reference heads of `experiments.families` (in `--families`; made where they are missing): 10
heads, chosen by other users. Strength 0.25 or 1, and for vectors layer 10 or 15, are chosen on one discovery example a
user; vectors and LoRAs are made of the newest 4. Greedy answers: headlines, the newest 2 of each blogger, 24 tokens;
posts, the newest of each blogger, and abstracts, one of each of 16 authors, 48 tokens. A corpus is a run folder under
`--out` and resumes, and `--only govblog` runs one of them, so that two processes share the work; `--out/results.md`
holds the tables of what has been run, `mean (low to high)` being 95% intervals over users.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import dps_lens as dps
from dps_lens.evaluation import Evaluation
from dps_lens.families import draw_seed, random_heads
from dps_lens.files import write_text
from experiments.families import PROMPT, Experiment, K
from experiments.tables import cell, table

STRENGTHS = (0.25, 1.0)
LAYERS = (10, 15)
ANSWERED = {"govblog": 2, "topics": 1, "acl": 1}
TOKENS = {"govblog": 24, "topics": 48, "acl": 48}
VECTOR_EXAMPLES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--govblog", required=True, help="LaMP-4 questions, outputs beside them")
    parser.add_argument("--topics", help="LongLaMP topics of the same bloggers")
    parser.add_argument("--acl", required=True, help="LongLaMP abstracts")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--families", type=Path, default=Path("runs/families"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--only", default="govblog,acl,topics", help="comma-separated corpora")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    sources = {"govblog": arguments.govblog, "acl": arguments.acl}
    found = Experiment(dps.load_model(arguments.model), sources, arguments.families)
    only = arguments.only.split(",")
    for corpus in ("govblog", "acl", *(("topics",) if arguments.topics else ())):
        if corpus in only:
            users = found.users[corpus] if corpus in found.users else dps.load_users(arguments.topics)
            evaluation(found, corpus, users, arguments.out / corpus)
            write_results(arguments.out)


def write_results(out: Path) -> None:
    """The tables of every corpus that has been run."""
    parts = [__doc__ or ""]
    for corpus in ANSWERED:
        if (out / corpus / "evaluation.json").is_file():
            done = Evaluation.load(out / corpus)
            parts.append(f"## {corpus}\n\n{metrics(done)}\n\n{chosen(done)}\n")
    write_text(out / "results.md", "\n".join(parts))


def evaluation(e: Experiment, corpus: str, users: list[dps.data.User], out: Path) -> Evaluation:
    """All methods on one corpus; users with too few discovery examples for a style vector are left out."""
    users = [user for user in users if len(user.discovery_examples()) > 1]
    heads: dict[str, Any] = {name: scores.top(K) for name, scores in e.refs().items() if scores.defined}
    scores = e.scores("acl" if corpus == "acl" else "govblog")
    heads["Preference Heads"] = {user.id: scores.without({user.id}).top(K) for user in users}
    heads["random heads"] = {
        user: random_heads(e.model, chosen, match="nearest", seed=draw_seed(0, index))
        for index, (user, chosen) in enumerate(heads["Preference Heads"].items())
    }
    methods: dict[str, Any] = {"plain": "plain", "rag": "rag", "prompt": "prompt", "cad": "cad", "dola": "dola"}
    methods |= {f"dps, {name}": ("dps", of) for name, of in heads.items() if name != "function_vector"}
    methods |= {
        "dps-entropy, Preference Heads": ("dps-entropy", heads["Preference Heads"]),
        "decore, retrieval": ("decore", heads["retrieval"]),
        "amplify, Preference Heads": ("amplify", heads["Preference Heads"]),
        "dps+cad, Preference Heads": ("dps+cad", heads["Preference Heads"]),
        "stylevector": "stylevector",
        "rag+stylevector": "rag+stylevector",
        "steerx": "steerx",
        "rag+steerx": "rag+steerx",
        "lora": "lora",
        "rag+lora": "rag+lora",
    }
    return dps.evaluate(
        e.model,
        users,
        methods,
        strengths=STRENGTHS,
        layers=LAYERS,
        ks=(K,),
        vector_examples=VECTOR_EXAMPLES,
        max_examples=ANSWERED[corpus],
        max_new_tokens=TOKENS[corpus],
        prompt=PROMPT,
        out=out,
    )


def metrics(done: Evaluation) -> str:
    """Metrics with intervals, differences to `rag`, and costs relative to `rag`."""
    means = done.to_frame().set_index(["method", "metric"]).to_dict("index")
    changes = done.differences("rag").set_index(["method", "metric"]).to_dict("index")
    costs = done.costs.set_index("method")
    costs = costs / costs.loc["rag"]
    names = [name for name in done.metrics if name != "tokens"]
    compared = (names[0], "style")
    head = [
        "method",
        *(part for name in names for part in (name, *(["to rag"] if name in compared else []))),
    ]
    lines = []
    for method in done.methods:
        line = [method]
        for name in names:
            line.append(cell(means.get((method, name), {"mean": float("nan")})))
            if name in compared:
                line.append(cell(changes.get((method, name), {"mean": float("nan")})))
        known = method in costs.index
        lines.append([*line, *(f"{costs.loc[method, column]:.2f}" if known else "" for column in costs.columns)])
    return table([*head, "time", "FLOPs"], lines)


def chosen(done: Evaluation) -> str:
    """What was chosen, and the grid's range on discovery examples."""
    metric = done.metrics[0]
    grids = done.choices.groupby("method", sort=False)
    lines = []
    for method, grid in grids:
        if len(grid) > 1:
            best = grid[grid["chosen"]].iloc[0]
            lines.append([method, best["setting"], f"{best[metric]:.3f}", f"{grid[metric].min():.3f}", str(len(grid))])
    return table(["method", "chosen", f"{metric} on discovery", "least in the grid", "settings"], lines)


if __name__ == "__main__":
    main()
