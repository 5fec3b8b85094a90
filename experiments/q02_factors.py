"""Do heads read a user's style, a user's topic, or both alike?

    python -m experiments.q02_factors [--config FILE.yaml] [--out runs/factors]

Question. The built-in users cross 3 styles with 4 topics. Which heads respond to an author of the same style, which to
one of the same topic, and does ablating the style heads spare topic?

Hypotheses. (1) Some heads respond to style. (2) Some heads respond to topic. (3) Ablating the style heads takes style
and spares topic.

Measure. A text is scored below four profiles: its author's, that of another author of the same style, of the same
topic, and of neither. The effect of style on a head is half of (own + same style − same topic − neither) of what its
ablation costs, nats per token; that of topic likewise. Heads are chosen on the older documents; the top 10 by either
effect are ablated together on the two newest of each author. `taken` is the same contrast of what that costs: the part
of the gain by style, or by topic, that goes.

Control. Style and topic are fixed factors. Labels are permuted within the crossing: exchanging same style for other
style in a document's four prompts flips the sign of its effect; the largest |t| over heads under 10,000 random flips
corrects for their number. Held out: 20 random sets of the same layers. Intervals are over documents within cells.

Decision rule. (1), (2): supported if a head's effect is positive with corrected p at most 0.05, else undecided (few
documents cannot show that there are none). (3): supported if the style heads take more of the gain by style than their
random sets do, and more of style than of topic compared with the topic heads (the difference of the two differences):
both intervals above 0; not supported if either lies below 0; else undecided.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import dps_lens as dps
from dps_lens.data import Example, User
from dps_lens.data.examples import data_digest
from dps_lens.scores import HeadScores
from dps_lens.scoring import single_heads
from dps_lens.selection import random_sets
from dps_lens.stats.intervals import columns
from experiments.lib.crossing import EFFECTS, SHARED, conditions, contrasts, within_cells
from experiments.lib.harness import Claim, Config, Findings, Lab, Outcome, all_above_zero, main
from experiments.lib.measured import Changes, changes

ALPHA = 0.05
FACTORS = ("style", "topic")


class Factors(Config):
    users: str = "probe"
    max_examples: int = 3
    k: int = 10
    n_random: int = 20
    held_out: int = 2


def measure(config: Factors, lab: Lab) -> Findings:
    users, cfg = lab.users(), lab.model.cfg
    older = [example for user in users for example in user.discovery_examples()[-config.max_examples :]]
    every = single_heads(cfg.n_layers, cfg.n_heads)
    effects, nll = run(older, every, "discovery", users, config, lab)
    gains = gain_table(nll, older, "discovery")
    maps = {name: as_scores(values, older, name, lab) for name, values in contrasts(effects).items()}
    tests = {name: dps.significant_heads(maps[name], seed=config.seed) for name in FACTORS}
    newest = [example for user in users for example in user.examples[-config.held_out :]]
    held_out, full = ablated(maps, newest, users, config, lab)
    pair = dps.overlap({name: maps[name] for name in FACTORS}, k=config.k, seed=config.seed).to_frame()
    tables = {
        "gain": pd.concat([gains, gain_table(full, newest, "held out")], ignore_index=True),
        "heads": pd.concat([head_table(maps, tests[name], name, older) for name in FACTORS], ignore_index=True),
        "overlap": pair.assign(**{f"halves, {n}": ceiling(maps[n], config) for n in FACTORS}),
        "held out": held_out,
    }
    claims = [responds(tests[name], name) for name in FACTORS]
    return Findings(tables, [*claims, spares(held_out)])


def run(examples: Sequence[Example], masks: Tensor, name: str, users: list[User], config: Factors, lab: Lab) -> Changes:
    prompt = config.prompt.config()
    about = {"prompt": prompt.to_dict(), "seed": config.seed, "data": data_digest(users, examples)}
    shown = conditions(lab.model, users, prompt, config.seed)
    return changes(lab.model, examples, shown, lambda _: masks, about, lab.out / name)


def as_scores(values: Float[Tensor, "example row"], examples: Sequence[Example], name: str, lab: Lab) -> HeadScores:
    """One unit a document, so that tests flip and halves split documents."""
    ids = [f"{example.user_id}/{example.id}" for example in examples]
    shaped = values.reshape(-1, lab.model.cfg.n_layers, lab.model.cfg.n_heads)
    return HeadScores(shaped, example_ids=ids, user_ids=ids, manifest={"family": name})


def gain_table(nll: dict[str, Tensor], examples: Sequence[Example], where: str) -> pd.DataFrame:
    """What the profile of the same style, or topic, is worth to the full model; and the four NLLs."""
    cells = [example.user_id for example in examples]
    rows = [{"documents": where, "measure": f"NLL, {name}", **within_cells(nll[name], cells)} for name in SHARED]
    gains = contrasts({name: -values for name, values in nll.items()})
    return pd.DataFrame(
        [*rows, *({"documents": where, "measure": f"gain by {n}", **within_cells(gains[n], cells)} for n in EFFECTS)]
    )


def head_table(
    maps: dict[str, HeadScores], test: dps.Significance, name: str, examples: Sequence[Example]
) -> pd.DataFrame:
    """The 10 heads of largest effect, with the other factor's effect beside it."""
    cells = [example.user_id for example in examples]
    rows = []
    for head in maps[name].top(min(10, test.p.numel())):
        row: dict[str, Any] = {"factor": name, "head": str(head)}
        for factor in FACTORS:
            row |= columns(factor, within_cells(maps[factor].values[:, head.layer, head.head], cells))
        rows.append(row | {"p": float(test.p[head])})
    return pd.DataFrame(rows)


def ceiling(scores: HeadScores, config: Factors) -> float:
    """Overlap of the top K of random halves of the documents."""
    found = dps.split_half(scores, k=config.k, seed=config.seed).set_index("measure")
    return float(found.loc["jaccard", "mean"])


def ablated(
    maps: dict[str, HeadScores], examples: Sequence[Example], users: list[User], config: Factors, lab: Lab
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Gains taken by style heads and by topic heads on held-out documents, beside random sets."""
    sets = {name: maps[name].top(config.k) for name in FACTORS}
    drawn = [one for of in sets.values() for one in random_sets(lab.model, of, config.n_random, config.seed)]
    masks = torch.stack([heads.mask(lab.model.cfg) for heads in (*sets.values(), *drawn)])
    effects, nll = run(examples, masks, "held_out", users, config, lab)
    taken, cells, rows = contrasts(effects), [example.user_id for example in examples], []
    chosen = {name: {f: taken[f][:, index] for f in FACTORS} for index, name in enumerate(FACTORS)}
    for index, name in enumerate(FACTORS):
        start = len(FACTORS) + index * config.n_random
        random = {f: taken[f][:, start : start + config.n_random].mean(1) for f in FACTORS}
        measures = {f"{factor} taken": chosen[name][factor] for factor in FACTORS}
        measures |= {f"{factor} taken, random sets": random[factor] for factor in FACTORS}
        measures |= {
            f"{factor} taken, more than random sets": chosen[name][factor] - random[factor] for factor in FACTORS
        }
        measures |= {"cost below a profile of neither": effects["neither"][:, index]}
        rows += [{"heads": name, "measure": m, **within_cells(values, cells)} for m, values in measures.items()]
    style, topic = chosen["style"], chosen["topic"]
    crossed = (style["style"] - style["topic"]) - (topic["style"] - topic["topic"])
    rows.append({"heads": "style − topic", "measure": "style − topic taken", **within_cells(crossed, cells)})
    return pd.DataFrame(rows), nll


def responds(test: dps.Significance, name: str) -> Claim:
    found = test.significant & (test.mean > 0)
    outcome: Outcome = "supported" if bool(found.any()) else "undecided"
    measured = {"heads": int(found.sum()), "smallest p": float(test.p[test.mean > 0].min())}
    return Claim(f"some heads respond to {name}", f"corrected p at most {ALPHA}", measured, outcome)


def spares(held_out: pd.DataFrame) -> Claim:
    rows = held_out.set_index(["heads", "measure"])
    found = {
        "more than random sets": rows.loc["style", "style taken, more than random sets"],
        "difference of differences": rows.loc["style − topic", "style − topic taken"],
    }
    return all_above_zero("ablating style heads takes style and spares topic", found)


if __name__ == "__main__":
    main("factors", __doc__ or "", Factors, measure)
