"""Finders beside planted truths: as many heads as there are carriers are the carriers, for every resample of users."""

import plants
import pytest

import dps_lens as dps

# Once the head that writes is patched, the one that it follows is no loss: a finder that adds heads one at a time to a
# measured set has no use for it.
MISSED = {("greedy", "chain"), ("conditional", "chain")}
CASES = [(method, name) for method in ("rank", "greedy", "conditional", "gates") for name in plants.NAMES]
LONG = {(method, name) for method in ("greedy", "gates") for name in ("redundant", "chain", "style_topic")}


@pytest.fixture(scope="module")
def find(planted):
    def run(method, name):
        case = planted(name)
        free = {"max_task_cost": None, "max_neutral_cost": None}
        return dps.find_heads(case.model, case.users, len(case.carriers), method=method, max_examples=2, **free)

    return run


@pytest.mark.parametrize(
    ("method", "name"),
    [pytest.param(*case, marks=[pytest.mark.full] * (case in LONG)) for case in CASES if case not in MISSED],
)
def test_all_carriers_and_no_other_head(find, planted, method, name):
    found = find(method, name)
    assert len(found.resampled) >= 4
    assert all({*heads} == planted(name).carriers for heads in [found.heads, *found.resampled, *found.by_fold])


@pytest.mark.full
@pytest.mark.parametrize(("method", "name"), sorted(MISSED))
def test_the_first_of_a_chain_is_no_loss_to_a_measured_set(find, planted, method, name):
    found = find(method, name)
    first, second = sorted(planted(name).carriers)
    assert found.heads.heads[0] == second
    assert first not in found.heads
