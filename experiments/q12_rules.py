"""Does any rule steer towards the user? Rules × strengths on held-out headlines, beside random heads, at equal KL.

    python -m experiments.q12_rules [--config FILE.yaml] [--out runs/rules]

Question. Which rule of decoding, with which heads, how many of them, weighted or not, and edited where, makes the
user's own text likelier, and what does it do to what is written?

Hypotheses, put into this form when the numbers were known. (1) Some method makes the users' own text likelier. (2) DPS
with Preference Heads does so more than with random heads.

Measure. Change of the NLL of the users' own text, teacher-forced, at strengths from 0.125 to 4, and at the strength
where the mean KL(steered ‖ full) is 0.02, 0.1 or 0.3 nats a token. `text`: the newest headlines, at most 4 a blogger.
`sizes`: the same for 3 and 30 heads. `weights`: 10 and 30 heads, each edited in proportion to its score. `places`:
heads left out of the whole pass, or of the profile only; the newest 2 headlines. `writing`: greedy headlines, 2 a
blogger, 24 tokens: ROUGE-L, also at equal realised KL, and variety; there the entropy γ is not capped, and counts leave
out the end token. Heads and scores as in q11_families.

Control. 8 random sets of the same layers for every method with heads; 4 in `places`, 3 in `writing`.

Decision rule, in `text` at KL 0.1. (1) for each method by the interval of the fall of the NLL, corrected for the number
of methods; (2) by the 95% interval of its difference to random heads: supported above 0, not supported below or at 0,
else undecided (also where a method does not reach this KL).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import dps_lens as dps
from dps_lens import literals
from dps_lens.data import Example
from dps_lens.data.tokenizer import without_special
from dps_lens.evaluation.likelihood import SweepMethod
from dps_lens.evaluation.metrics import rouge
from dps_lens.model import describe_model
from dps_lens.runs import RunFolder, kept
from dps_lens.selection import HeadSource, random_sets, rankings
from dps_lens.stats.intervals import columns, interval
from experiments.lib.harness import LONG, Config, Findings, Lab, Prompts, above_zero, main
from experiments.lib.measured import cross_fitted
from experiments.q10_steering import at_kls, fall
from experiments.q11_families import Tables, against_others, costly

OURS, OWN, AGAINST = "Preference Heads", "own Preference Heads", "heads scored against others"
DPS, HARMLESS = f"dps, {OURS}", f"dps, harmless {OURS}"
PLACES: tuple[literals.Positions, ...] = ("all", "profile")
GREEDY, GAMMAS = "greedy", (0.5, 1.0, 2.0)
VARIETY = ("distinct-1", "distinct-2", "repeated", "tokens")
Step = Literal["text", "sizes", "weights", "places", "writing"]


class Rules(Config):
    prompt: Prompts = LONG
    steps: tuple[Step, ...] = ("text", "sizes", "weights", "places", "writing")
    kinds: tuple[str, ...] = ("induction", "retrieval")
    k: int = 10
    sizes: tuple[int, ...] = (3, 30)
    strengths: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
    kls: tuple[float, ...] = (0.02, 0.1, 0.3)
    decided_at: float = 0.1
    n_random: int = 8
    held_out: int = 4
    places_random: int = 4
    places_held_out: int = 2
    written: int = 2
    written_random: int = 3
    new_tokens: int = 24


class Given(NamedTuple):
    """What every step starts from."""

    config: Rules
    lab: Lab
    users: list[dps.User]
    scores: dps.HeadScores
    refs: dict[str, dps.HeadScores]

    def sweep(self, name: str, methods: Mapping[str, SweepMethod], **options: Any) -> dps.SteeringSweep:
        config = self.config
        settings: dict[str, Any] = {"k": config.k, "n_random": config.n_random, "max_examples": config.held_out}
        settings |= {"strengths": config.strengths, "prompt_config": config.prompt.config(), "seed": config.seed}
        out = self.lab.out / name
        return dps.steering_sweep(self.lab.model, self.users, methods, **settings | options, out=out)

    def compared(self) -> dict[str, dps.HeadScores]:
        """Preference Heads, and induction heads where the model shows them."""
        return {OURS: self.scores} | {name: of for name, of in self.refs.items() if name == "induction"}


def measure(config: Rules, lab: Lab) -> Findings:
    users = lab.users()
    given = Given(config, lab, users, lab.scores(users), lab.references(config.kinds))
    tables = {name: table for step in config.steps for name, table in STEPS[step](given).items()}
    read: dict[str, dict[str, float]] = {}
    if "text" in config.steps:
        sweep = dps.SteeringSweep.load(lab.out / "text")
        methods = [name for name in sweep.methods if not name.endswith(" (random)")]
        corrected = sweep.at_kl(config.decided_at, 1 - 0.05 / len(methods)).set_index("method")
        read = {f"{name} makes the users' own text likelier": fall(corrected.loc[name], "mean") for name in methods}
        plain = sweep.at_kl(config.decided_at).set_index("method").loc[DPS]
        read["DPS does so more than with random heads"] = fall(plain, "difference")
    return Findings(tables, [above_zero(*one) for one in read.items()])


def text(given: Given) -> Tables:
    """NLL of the users' own text, at every strength and at equal KL."""
    scores, refs = given.scores, given.refs
    methods: dict[str, SweepMethod] = {
        DPS: ("dps", scores),
        f"dps, {OWN}": ("dps", scores),
        HARMLESS: ("dps", scores),
        f"dps, {AGAINST}": ("dps", against_others(given.users, given.lab)),
        **{f"dps, {name}": ("dps", of) for name, of in refs.items()},
        f"dps-entropy, {OURS}": ("dps-entropy", scores),
        f"amplify, {OURS}": ("amplify", scores),
        "cad": "cad",
    }
    if "retrieval" in refs:
        methods["decore, retrieval"] = ("decore", refs["retrieval"])
    if "induction" in refs:
        methods |= {f"{rule}, induction": (rule, refs["induction"]) for rule in ("amplify", "dps+cad")}
    held_out = dps.HeldOutConfig(exclude={HARMLESS: costly(scores)})
    sweep = given.sweep("text", methods, select={f"dps, {OWN}": "user"}, held_out_config=held_out)
    return {"text": at_kls(sweep, given.config.kls), "strengths": sweep.to_frame()}


def sizes(given: Given) -> Tables:
    """Fewer and more heads."""
    found = []
    for k in given.config.sizes:
        methods: dict[str, SweepMethod] = {f"dps, {k} {name}": ("dps", of) for name, of in given.compared().items()}
        found.append(at_kls(given.sweep(f"text_{k}", methods, k=k), given.config.kls))
    return {"sizes": pd.concat(found, ignore_index=True)}


def weights(given: Given) -> Tables:
    """Heads edited in proportion to their score."""
    found = []
    for k in (given.config.k, given.config.sizes[-1]):
        methods: dict[str, SweepMethod] = {
            f"{rule}, {k} weighted {OURS}": (rule, given.scores) for rule in ("dps", "amplify")
        }
        weighted = dps.HeldOutConfig(weighted=tuple(methods))
        found.append(at_kls(given.sweep(f"weights_{k}", methods, k=k, held_out_config=weighted), given.config.kls))
    return {"weights": pd.concat(found, ignore_index=True)}


def places(given: Given) -> Tables:
    """Heads left out where they write, and of the whole pass."""
    config, found = given.config, []
    heads: dict[str, HeadSource] = {name: of.top(config.k) for name, of in given.compared().items()}
    heads[OURS] = cross_fitted(given.scores, given.users, config.k, config.seed)
    options: dict[str, Any] = {"n_random": config.places_random, "max_examples": config.places_held_out}
    for place in PLACES:
        methods: dict[str, SweepMethod] = {f"dps at {place}, {name}": ("dps", of) for name, of in heads.items()}
        options["held_out_config"] = dps.HeldOutConfig(positions=place)
        found.append(at_kls(given.sweep(f"places_{place}", methods, **options), config.kls))
    return {"places": pd.concat(found, ignore_index=True)}


class Call(NamedTuple):
    """One call of `generate`, whose rows share a prompt's pass: label, whose heads, γ or α of each."""

    rule: str
    rows: list[tuple[str, str, float]]
    min_p: float | None = None


def plan(names: Sequence[str]) -> list[Call]:
    """What is written with heads of these names."""

    def rows(label: str, strengths: Sequence[float], of: Sequence[str]) -> list[tuple[str, str, float]]:
        return [(f"{label}, {name}", name, strength) for name in of if name in names for strength in strengths]

    dps_rows = [(GREEDY, OURS, 0.0), *rows("dps", GAMMAS, names), *rows("masked", (-1.0,), names)]
    calls = [
        Call("dps", dps_rows),
        Call("dps", rows("dps, min_p 0.1", GAMMAS[1:], (OURS, "induction")), min_p=0.1),
        Call("dps-entropy", rows("dps-entropy", (1.0,), (OURS,))),
        Call("decore", rows("decore", (1.0,), ("retrieval",))),
        Call("amplify", rows("amplify", (0.25, 0.5, 1.0), (OURS, "induction", "random 0"))),
        Call("cad", [("cad", "", alpha) for alpha in GAMMAS]),
        Call("dola", [("dola", "", 1.0)]),
    ]
    return [call for call in calls if call.rows]


def writing(given: Given) -> Tables:
    """Greedy headlines under every setting: ROUGE-L, distinct n-grams, repetition, realised KL."""
    frame = pd.DataFrame(answers(given))
    return {"writing at KL": written_at_kl(frame, given.config.kls), "writing": written(frame)}


def answers(given: Given) -> Iterator[dict[str, Any]]:
    """Every answer and what it is worth; random draws count as one method."""
    config, model = given.config, given.lab.model
    families: dict[str, HeadSource] = {OURS: given.scores, OWN: given.scores}
    families |= {AGAINST: against_others(given.users, given.lab), **given.refs}
    ranked, _ = rankings("writing", families, given.users, (config.k,), {OWN: "user"}, seed=config.seed)
    calls = plan([*ranked, *(f"random {draw}" for draw in range(config.written_random))])
    settings = {"sets": {n: {u: str(h[0]) for u, h in of.items()} for n, of in ranked.items()}, "plan": str(calls)}
    settings |= {"config": config.model_dump(mode="json", include={"prompt", "written", "new_tokens", "seed"})}
    folder = RunFolder(given.lab.out / "writing", settings | {"model": describe_model(model)})
    for user in given.users:
        heads = {name: by_user[user.id][0] for name, by_user in ranked.items()}
        drawn = random_sets(model, heads[OURS], config.written_random, config.seed)
        heads |= {f"random {draw}": one for draw, one in enumerate(drawn)}
        for example in user.examples[-config.written :]:
            unit = kept(folder, example.id, partial(write, given, example, heads, calls))
            for index, (label, _, strength) in enumerate(row for call in calls for row in call.rows):
                tokens = without_special(model, unit[f"tokens.{index}"]).tolist()
                about = {"method": re.sub(r"random \d+", "random", label), "strength": strength}
                about |= {"user": user.id, "example": example.id, "KL": float(unit[f"kl.{index}"])}
                worth = rouge(example.reference, model.tokenizer.decode(tokens).strip())
                yield about | {"ROUGE-L": worth["ROUGE-L"]} | variety(tokens)


def write(given: Given, example: Example, heads: Mapping[str, dps.HeadSet], calls: Sequence[Call]) -> dict[str, Tensor]:
    """Tokens and mean KL a step of every setting."""
    model, prompt = given.lab.model, given.config.prompt.config()
    own, none = dps.build_prompt(model, example, config=prompt), dps.build_prompt(model, example, "none", config=prompt)
    found: dict[str, Tensor] = {}
    for rule, rows, min_p in calls:
        strengths = [strength for _, _, strength in rows]
        options: dict[str, Any] = {}
        if rule == "cad":
            options = {"alpha": strengths, "negative_prompts": [none] * len(rows)}
        elif rule != "dola":
            options = {"gamma": strengths, "heads": [heads[name] for _, name, _ in rows]}
        options |= {"max_new_tokens": given.config.new_tokens, "decode_config": dps.DecodeConfig(min_p=min_p)}
        made = dps.generate(model, [own] * len(rows), rule=rule, **options)
        for tokens, kl in zip(made.tokens, made.kl, strict=True):
            index = len(found) // 2
            found |= {f"tokens.{index}": tokens, f"kl.{index}": kl.double().mean()}
    return found


def variety(tokens: list[int]) -> dict[str, float]:
    """Distinct 1- and 2-grams over all of them, share of 3-grams that were there before, and length."""
    grams = {n: list(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in (1, 2, 3)}
    share = {n: len({*of}) / len(of) if of else 1.0 for n, of in grams.items()}
    return {"distinct-1": share[1], "distinct-2": share[2], "repeated": 1 - share[3], "tokens": float(len(tokens))}


def written(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over users of what was written, with intervals, and the difference of ROUGE-L to greedy decoding."""
    by_user = frame.groupby(["method", "strength", "user"], sort=False).mean(numeric_only=True)
    of_setting = {key: of.droplevel([0, 1]) for key, of in by_user.groupby(level=[0, 1], sort=False)}
    greedy, rows = of_setting[GREEDY, 0.0], []
    for (method, strength), own in of_setting.items():
        row = {"method": method, "strength": strength, **columns("ROUGE-L", interval(own["ROUGE-L"].to_numpy()))}
        difference = interval((own["ROUGE-L"] - greedy["ROUGE-L"]).to_numpy())
        row |= columns("to greedy", difference) if method != GREEDY else {}
        for name in ("KL", *VARIETY):
            row |= columns(name, interval(own[name].to_numpy()))
        rows.append(row)
    return pd.DataFrame(rows)


def written_at_kl(frame: pd.DataFrame, kls: Sequence[float]) -> pd.DataFrame:
    """ROUGE-L less that of greedy decoding, at equal realised KL, for the methods that were run at every strength."""
    values = frame.groupby(["method", "strength", "user", "example"], sort=False)[["ROUGE-L", "KL"]].mean()
    of_setting = {key: of.droplevel([0, 1]) for key, of in values.groupby(level=[0, 1], sort=False)}
    greedy, change, kl = of_setting[GREEDY, 0.0], {}, {}
    for method in dict.fromkeys(frame["method"]):
        of = [of_setting[method, gamma] for gamma in GAMMAS if (method, gamma) in of_setting]
        if len(of) == len(GAMMAS) and not of[0]["KL"].isna().any():
            # Random heads are the control of the others.
            name = f"{DPS} (random)" if method == "dps, random" else method
            change[name] = torch.tensor(np.stack([one["ROUGE-L"] - greedy["ROUGE-L"] for one in of]))
            kl[name] = torch.tensor(np.stack([one["KL"] for one in of]))
    users, examples = (tuple(greedy.index.get_level_values(level)) for level in ("user", "example"))
    nll = torch.zeros(len(users), dtype=torch.float64)
    return at_kls(dps.SteeringSweep(GAMMAS, users, examples, nll, change, kl), kls)


STEPS: dict[Step, Callable[[Given], Tables]] = {
    "text": text,
    "sizes": sizes,
    "weights": weights,
    "places": places,
    "writing": writing,
}

if __name__ == "__main__":
    main("rules", __doc__ or "", Rules, measure)
