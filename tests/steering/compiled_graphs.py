"""What torch compiles of a decoding step: one graph for a shape, without a break; run by test_compiled.py."""

import sys

import torch
import torch._dynamo as dynamo

import dps_lens as dps
from dps_lens.heads import HeadSet
from dps_lens.steering import compiled
from dps_lens.steering.compiled import program_of

N = 12
SETS = [HeadSet.parse(names) for names in ("L0H1,L2H3", "L1H0")]
TEXTS = ["The rain in the old town", "Nobody carries an umbrella there, not even in"]


def main() -> None:
    model = dps.load_model(sys.argv[1])
    vectors = [dps.HeadVector(torch.randn(len(one), model.cfg.d_head), HeadSet(one, shape=(3, 4))) for one in SETS]
    dps_heads = {"rule": "dps", "heads": SETS, "gamma": 0.7}
    program_of(model)  # which is traced once to see whether it goes
    calls = (
        (TEXTS, dps_heads, 1),
        (TEXTS, dps_heads | {"heads": SETS[::-1], "gamma": 0.3}, 1),  # other heads and strengths
        (TEXTS[::-1], dps_heads, 1),  # other prompts
        (TEXTS, {"rule": "dola"}, 2),  # another number of rows, and layers that are read
        (TEXTS, {"rule": "head_vector", "vectors": vectors}, 3),
        (TEXTS, {"rule": "head_vector", "vectors": vectors[::-1], "gamma": 2.0}, 3),
        (TEXTS, {"rule": "decore", "heads": SETS}, 4),
    )
    dynamo.utils.counters.clear()
    for prompts, given, graphs in calls:
        written = [
            dps.generate(model, prompts, max_new_tokens=N, decode_config=dps.DecodeConfig(compile=compiled_), **given)
            for compiled_ in (False, True)
        ]
        assert [row.tolist() for row in written[0].tokens] == [row.tolist() for row in written[1].tokens], given["rule"]
        counted = dynamo.utils.counters
        # A number that the host waits for, `.item()`, would break the graph, too.
        assert not counted["graph_break"], counted["graph_break"]
        assert counted["stats"]["unique_graphs"] == graphs, (given["rule"], counted["stats"])


def traced(folder: str) -> None:
    """Another architecture, traced whole, and run as it was traced."""
    compiled._BACKEND = "eager"
    model = dps.load_model(folder)
    given = {"rule": "dps", "heads": SETS, "gamma": 0.7, "max_new_tokens": N}
    plain, ours = (
        dps.generate(model, TEXTS, decode_config=dps.DecodeConfig(compile=compiled_), **given)
        for compiled_ in (False, True)
    )
    assert [row.tolist() for row in plain.tokens] == [row.tolist() for row in ours.tokens], folder


if __name__ == "__main__":
    main()
    for folder in sys.argv[2:]:
        traced(folder)
