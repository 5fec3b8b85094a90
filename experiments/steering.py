"""Does any rule steer towards the user? Rules × strengths on held-out headlines, beside random heads, at equal KL.

    python -m experiments.steering --govblog DATA/govblog/lamp4_questions.json

Uses the scores and reference heads of `experiments.families` (in `--families`; made where they are missing).
`text`: NLL of the users' own text, teacher-forced, the newest headlines (at most 4 a blogger), 8 random sets a method.
`sizes`: the same for 3 and 30 heads. `weights`: 10 and 30 heads, each edited in proportion to its score. `places`:
heads left out of the whole pass, or of the profile only; the newest 2 headlines, 4 random sets. `writing`: greedy
headlines, 2 a blogger, 24 tokens, 3 random sets; there the entropy γ is not capped, and counts leave out the end token.
Every step resumes; `--out/results.md` holds the tables, `mean (low to high)` being 95% intervals over users.
"""

import argparse
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import dps_lens as dps
from dps_lens.analysis import SteeringSweep
from dps_lens.analysis.generation import score_text
from dps_lens.analysis.intervals import interval
from dps_lens.analysis.rankings import rankings
from dps_lens.families import draw_seed, random_heads
from dps_lens.model import describe_model
from dps_lens.runs import RunFolder
from experiments.families import HELD_OUT, MAX_COST, PROMPT, Experiment, K
from experiments.tables import cell, table

STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
AT_KL = (0.02, 0.1, 0.3)
SIZES = (3, 30)
WRITTEN, TOKENS = 2, 24
RANDOM = ("random 0", "random 1", "random 2")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--govblog", required=True, help="LaMP-4 questions, outputs beside them")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--families", type=Path, default=Path("runs/families"))
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    parser.add_argument("--only", default="", help="comma-separated steps; all by default")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    found = Experiment(dps.load_model(arguments.model), {"govblog": arguments.govblog}, arguments.families)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for step in arguments.only.split(",") if arguments.only else STEPS:
        print(f"== {step}", file=sys.stderr, flush=True)
        (arguments.out / f"{step}.md").write_text(STEPS[step](found, arguments.out), encoding="utf-8")
    parts = [
        f"## {step}\n\n{(arguments.out / f'{step}.md').read_text()}\n"
        for step in STEPS
        if (arguments.out / f"{step}.md").is_file()
    ]
    (arguments.out / "results.md").write_text("\n".join([__doc__ or "", *parts]), encoding="utf-8")


def costly(scores: dps.HeadScores) -> dps.HeadSet:
    """Heads whose ablation costs over 0.05 nats where there is no profile."""
    found = (scores.mean(of="no_profile") > MAX_COST).nonzero().tolist()
    return dps.HeadSet([(layer, head) for layer, head in found])


def text(e: Experiment, out: Path) -> str:
    """NLL of the users' own text, at every strength and at equal KL."""
    preference, refs = e.scores("govblog"), e.refs()
    methods = {
        "dps, Preference Heads": ("dps", preference),
        "dps, own Preference Heads": ("dps", preference),
        "dps, harmless Preference Heads": ("dps", preference),
        "dps, heads scored against others": ("dps", e.against_others()),
        "dps, induction": ("dps", refs["induction"]),
        "dps, retrieval": ("dps", refs["retrieval"]),
        "dps-entropy, Preference Heads": ("dps-entropy", preference),
        "decore, retrieval": ("decore", refs["retrieval"]),
        "amplify, Preference Heads": ("amplify", preference),
        "amplify, induction": ("amplify", refs["induction"]),
        "cad": "cad",
        "dps+cad, induction": ("dps+cad", refs["induction"]),
    }
    sweep = dps.steering_sweep(
        e.model,
        e.users["govblog"],
        methods,
        strengths=STRENGTHS,
        k=K,
        n_random=8,
        select={"dps, own Preference Heads": "user"},
        exclude={"dps, harmless Preference Heads": costly(preference)},
        max_examples=HELD_OUT["govblog"],
        prompt=PROMPT,
        out=out / "text",
    )
    sweep.plot().write_html(out / "text.html")
    return f"{at_equal_kl(sweep)}\n\n{at_strengths(sweep)}"


def sizes(e: Experiment, out: Path) -> str:
    """Fewer and more heads."""
    parts = []
    for k in SIZES:
        sweep = dps.steering_sweep(
            e.model,
            e.users["govblog"],
            {
                f"dps, {k} Preference Heads": ("dps", e.scores("govblog")),
                f"dps, {k} induction": ("dps", e.refs()["induction"]),
            },
            strengths=STRENGTHS,
            k=k,
            n_random=8,
            max_examples=HELD_OUT["govblog"],
            prompt=PROMPT,
            out=out / f"text_{k}",
        )
        parts.append(at_equal_kl(sweep))
    return "\n\n".join(parts)


def weights(e: Experiment, out: Path) -> str:
    """Heads edited in proportion to their score."""
    parts = []
    for k in (K, SIZES[-1]):
        methods = {f"{rule}, {k} weighted Preference Heads": (rule, e.scores("govblog")) for rule in ("dps", "amplify")}
        sweep = dps.steering_sweep(
            e.model,
            e.users["govblog"],
            methods,
            strengths=STRENGTHS,
            k=k,
            n_random=8,
            weighted=tuple(methods),
            max_examples=HELD_OUT["govblog"],
            prompt=PROMPT,
            out=out / f"weights_{k}",
        )
        parts.append(at_equal_kl(sweep))
    return "\n\n".join(parts)


def places(e: Experiment, out: Path) -> str:
    """Heads left out where they write, and of the whole pass."""
    parts, heads = [], {"Preference Heads": e.heads("govblog"), "induction": e.refs()["induction"].top(K)}
    for positions in ("all", "profile"):
        sweep = dps.steering_sweep(
            e.model,
            e.users["govblog"],
            {f"dps at {positions}, {name}": ("dps", chosen) for name, chosen in heads.items()},
            strengths=STRENGTHS,
            k=K,
            n_random=4,
            positions=positions,  # type: ignore[arg-type]
            max_examples=2,
            prompt=PROMPT,
            out=out / f"places_{positions}",
        )
        parts.append(at_equal_kl(sweep))
    return "\n\n".join(parts)


def at_equal_kl(sweep: SteeringSweep, what: str = "change of NLL") -> str:
    """Changes at equal KL, and the difference to random heads."""
    found = {kl: sweep.at_kl(kl).set_index("method").to_dict("index") for kl in AT_KL}
    head = [what]
    head += [name for kl in AT_KL for name in (f"KL {kl}", "difference to random heads")]
    lines = []
    for method in sweep.methods:
        if method.endswith(" (random)"):
            continue
        rows = [found[kl][method] for kl in AT_KL]
        lines.append([method, *(cell(row, name) for row in rows for name in ("mean", "difference"))])
    return table(head, lines)


def at_strengths(sweep: SteeringSweep) -> str:
    """Change of the NLL and KL at every strength."""
    rows = {(row["method"], row["strength"]): row for row in sweep.to_frame().to_dict("records")}
    lines = [
        [method, *(f"{cell(rows[method, s])}; {rows[method, s]['kl']:.2f}" for s in sweep.strengths)]
        for method in sweep.methods
    ]
    return table(["change of NLL; KL", *(f"{strength:g}" for strength in sweep.strengths)], lines)


def settings(heads: Mapping[str, list[dps.HeadSet]]) -> dict[str, list[tuple[str, str, float, dict[str, Any]]]]:
    """What is written, by call of `generate`: (label, heads, strength, options); one call shares a prompt's pass."""
    chosen = [name for name in heads if name not in RANDOM]
    dps_rows = [("greedy", "induction", 0.0, {})]
    dps_rows += [(f"dps, {name}", name, gamma, {}) for name in [*chosen, *RANDOM] for gamma in (0.5, 1.0, 2.0)]
    dps_rows += [(f"masked, {name}", name, -1.0, {}) for name in [*chosen, *RANDOM]]
    found = {"dps": dps_rows}
    found["dps, plausible"] = [
        (f"dps, plausibility 0.1, {name}", name, gamma, {"plausibility": 0.1})
        for name in ("Preference Heads", "induction")
        for gamma in (1.0, 2.0)
    ]
    found["dps-entropy"] = [("dps-entropy, Preference Heads", "Preference Heads", 1.0, {"rule": "dps-entropy"})]
    found["decore"] = [("decore, retrieval", "retrieval", 1.0, {"rule": "decore"})]
    found["amplify"] = [
        (f"amplify, {name}", name, beta, {"rule": "amplify"})
        for name in ("Preference Heads", "induction", "random 0")
        for beta in (0.25, 0.5, 1.0)
    ]
    found["cad"] = [("cad", "induction", alpha, {"rule": "cad"}) for alpha in (0.5, 1.0, 2.0)]
    found["dola"] = [("dola", "induction", 1.0, {"rule": "dola"})]
    return found


def writing(e: Experiment, out: Path) -> str:
    """Greedy headlines under every setting: ROUGE-L, distinct n-grams, repetition, realised KL."""
    preference, refs = e.scores("govblog"), e.refs()
    users = e.users["govblog"]
    families = {"Preference Heads": preference, "own Preference Heads": preference}
    families |= {"heads scored against others": e.against_others()}
    families |= {"induction": refs["induction"], "retrieval": refs["retrieval"]}
    ranked, _ = rankings("writing", families, users, (K,), {"own Preference Heads": "user"})
    manifest = {
        "sets": {n: {u: str(h[0]) for u, h in of.items()} for n, of in ranked.items()},
        "written": WRITTEN,
        "tokens": TOKENS,
        "prompt": PROMPT.to_dict(),
    }
    plan = settings({**{name: dps.HeadSet() for name in ranked}, **{name: dps.HeadSet() for name in RANDOM}})
    folder = RunFolder(out / "writing", manifest | {"model": describe_model(e.model), "plan": str(plan)})
    rows, special = [], {*e.model.tokenizer.all_special_ids}
    for user in users:
        heads = {name: by_user[user.id][0] for name, by_user in ranked.items()}
        for draw, name in enumerate(RANDOM):
            chosen = heads["Preference Heads"]
            heads[name] = random_heads(e.model, chosen, match="nearest", seed=draw_seed(0, draw))
        for example in user.examples[-WRITTEN:]:
            unit = folder.get(example.id)
            if unit is None:
                print(example.id, file=sys.stderr, flush=True)
                unit = write(e, example, heads)
                folder.put(example.id, unit)
            for index, (label, strength) in enumerate(labels(heads)):
                tokens = [token for token in unit[f"tokens.{index}"].tolist() if token not in special]
                answer = e.model.tokenizer.decode(tokens).strip()
                measured = {"ROUGE-L": score_text(example, answer), **variety(tokens)}
                measured["KL"] = float(unit[f"kl.{index}"])
                asked = {"user": user.id, "example": example.id, "method": merged(label), "strength": strength}
                rows.append(asked | measured)
    frame = pd.DataFrame(rows)
    by_user = frame.groupby(["method", "strength", "user"], sort=False).mean(numeric_only=True)
    plain = by_user.sort_index().loc[("greedy", 0.0)]
    lines = []
    for (method, strength), of in by_user.groupby(level=["method", "strength"], sort=False):
        own = of.droplevel(["method", "strength"]).loc[plain.index]
        difference = interval((own["ROUGE-L"] - plain["ROUGE-L"]).to_numpy())
        shown = [cell(interval(own["ROUGE-L"].to_numpy())), cell(difference) if method != "greedy" else ""]
        for name in ("distinct-1", "distinct-2", "repeated", "KL"):
            shown.append(cell(interval(own[name].to_numpy()), digits=2))
        shown.append(f"{own['tokens'].mean():.1f}")
        lines.append([method, f"{strength:g}", *shown])
    head = ["method", "strength", "ROUGE-L", "difference to greedy", "distinct-1", "distinct-2", "repeated"]
    return f"{written_at_kl(frame)}\n\n{table([*head, 'KL a step', 'tokens'], lines)}"


def written_at_kl(frame: pd.DataFrame) -> str:
    """ROUGE-L less that of greedy decoding, at equal realised KL, for the methods that were run at every strength."""
    values = frame.groupby(["method", "strength", "user", "example"], sort=False)[["ROUGE-L", "KL"]].mean()
    greedy = values.loc[("greedy", 0.0), "ROUGE-L"]
    strengths, change, kl = (0.5, 1.0, 2.0), {}, {}
    for method in dict.fromkeys(frame["method"]):
        if all((method, strength) in values.index for strength in strengths) and method != "amplify, random":
            of = [values.loc[(method, strength)].reindex(greedy.index) for strength in strengths]
            if not of[0]["KL"].isna().any():
                change[method] = torch.tensor(np.stack([one["ROUGE-L"] - greedy for one in of]))
                kl[method] = torch.tensor(np.stack([one["KL"] for one in of]))
    for part in (change, kl):
        if "dps, random" in part:
            part["dps, Preference Heads (random)"] = part.pop("dps, random")
    users, examples = (tuple(greedy.index.get_level_values(level)) for level in ("user", "example"))
    nll = torch.zeros(len(users), dtype=torch.float64)
    return at_equal_kl(SteeringSweep(strengths, users, examples, nll, change, kl), "change of ROUGE-L")


def merged(label: str) -> str:
    """Random draws count as one method."""
    return re.sub(r"random \d", "random", label)


def labels(heads: Mapping[str, dps.HeadSet]) -> list[tuple[str, float]]:
    return [(row[0], row[2]) for rows in settings(heads).values() for row in rows]


def write(e: Experiment, example: Any, heads: Mapping[str, dps.HeadSet]) -> dict[str, torch.Tensor]:
    """Tokens and mean KL a step of every setting."""
    own, none = (dps.build_prompt(e.model, example, which, config=PROMPT) for which in ("own", "none"))
    found: dict[str, torch.Tensor] = {}
    for rows in settings(heads).values():
        options = {"rule": "dps", **rows[0][3]}
        strengths = [row[2] for row in rows]
        if options["rule"] == "cad":
            options |= {"alpha": strengths, "without": [none] * len(rows)}
        elif options["rule"] != "dola":
            options |= {"gamma": strengths, "heads": [heads[row[1]] for row in rows]}
        written: Any = dps.generate(e.model, [own] * len(rows), max_new_tokens=TOKENS, **options)
        for tokens, kl in zip(written.tokens, written.kl, strict=True):
            index = len(found) // 2
            found |= {f"tokens.{index}": tokens, f"kl.{index}": kl.double().mean()}
    return found


def variety(tokens: list[int]) -> dict[str, float]:
    """Distinct 1- and 2-grams over all of them, share of 3-grams that were there before, and length."""
    grams = {n: list(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in (1, 2, 3)}
    share = {n: len({*of}) / len(of) if of else 1.0 for n, of in grams.items()}
    return {"distinct-1": share[1], "distinct-2": share[2], "repeated": 1 - share[3], "tokens": float(len(tokens))}


STEPS = {"text": text, "sizes": sizes, "weights": weights, "places": places, "writing": writing}

if __name__ == "__main__":
    main()
