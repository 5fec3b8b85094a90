"""Tables on the terminal show the numbers of the results."""

import pytest

import dps_lens as dps
from dps_lens.cli.tables import print_cost, print_effects

SETS = {"carrier": dps.HeadSet.parse("L1H2"), "other": dps.HeadSet.parse("L0H1")}
SHOWN = ("gain_removed_other", "gain_removed", "task_cost", "neutral_cost", "necessity_other", "sufficiency_other")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def rows_of(printed, first):
    """Cells of the lines that begin with a word."""
    lines = [[cell.strip() for cell in line.replace("│", " ").split()] for line in printed.splitlines()]
    return [line for line in lines if line and line[0] == first]


def test_costs_and_patches_stand_beside_what_is_removed(toy_model, toy_users, capsys):
    effects = dps.ablation_curve(toy_model, toy_users, SETS, ks=(1,), n_random=20, max_examples=1)
    print_effects(effects)
    printed = capsys.readouterr().out
    frame = effects.to_frame().set_index(["family", "measure"])
    for family in SETS:
        row = rows_of(printed, family)[0]
        assert row[:2] == [family, "1"]
        assert len(row) == 2 + len(SHOWN)
        for cell, measure in zip(row[2:], SHOWN, strict=True):
            found = frame.loc[(family, measure)]
            assert float(cell.rstrip("+−")) == pytest.approx(found["mean"], abs=6e-4)
            if found["difference_low"] > 0 and found["p"] <= 0.05:
                assert cell.endswith("+")
            elif found["difference_high"] < 0 and found["p_less"] <= 0.05:
                assert cell.endswith("−")
            else:
                assert cell[-1].isdigit()
    assert rows_of(printed, "carrier")[0][2].endswith("+"), "the carrier carries"
    assert (
        printed.index("gain_removed_other, nats") < printed.index("task_cost, nats") < printed.index("neutral_cost, n")
    )


def test_effects_without_random_sets_are_printed(toy_model, toy_users, capsys):
    config = dps.HeldOutConfig(controls=("own",))
    for n_random in (0, 1):
        effects = dps.ablation_curve(
            toy_model, toy_users[:2], SETS, ks=(1,), n_random=n_random, max_examples=1, held_out_config=config
        )
        print_effects(effects)
        printed = capsys.readouterr().out
        assert "nan" not in printed
        assert len(rows_of(printed, "carrier")) == 1 + len(SHOWN)


def test_a_cost_is_printed_beside_its_random_sets(toy_model, toy_users, capsys):
    cost = dps.ablation_cost(toy_model, toy_users, SETS["carrier"], n_random=19, max_examples=1)
    print_cost(cost)
    printed = capsys.readouterr().out
    for row in cost.beside_random().to_dict("records"):
        assert f"{row['mean']:.3f}" in printed
        assert f"{row['low']:.3f} to {row['high']:.3f}" in printed
    for measure in SHOWN:
        (line,) = rows_of(printed, measure)
        assert len(line) == 4, "the set, random sets, their difference"
    assert " ".join(cost.verdict().split()) in " ".join(printed.split())
