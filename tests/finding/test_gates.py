"""Gates: the published procedure beside the published package, and sets that are known beforehand."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import toy

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.data.conditions import neutral_prompt, prompts_in
from dps_lens.errors import ScoreError
from dps_lens.finding import Bounds, Trial
from dps_lens.finding.causal_gates import CausalGates, GatingConfig, causal_head_gates
from dps_lens.finding.gates import Gates, memberships, soft_cost, soft_gain
from dps_lens.heads import Head, HeadSet
from dps_lens.intervene import Patch
from dps_lens.model import runner_of
from dps_lens.scoring.clean_run import CleanRun

CFG = SimpleNamespace(n_layers=3, n_heads=4)
CARRIER = Head(*toy.CARRIER)
TEXT = "The council met on Monday and agreed to repair the bridge before the winter comes, said the mayor. " * 3


def trial_of(model, users, example, config=None, donors=1, neutral=None):
    runner = runner_of(model)
    (own,) = prompts_in(model, example, "own", users, config=config)
    others = prompts_in(model, example, "other_user", users, n_donors=donors, config=config)
    (task,) = prompts_in(model, example, "no_profile", users, config=config)
    clean = CleanRun(runner, own, keep_z=True)
    runs = [CleanRun(runner, other, keep_z=True) for other in others]
    return Trial(
        user_id=example.user_id,
        necessity=tuple(clean.with_values(Patch(z=run.z)) for run in runs),
        sufficiency=tuple(run.with_values(Patch(z=clean.z)) for run in runs),
        task=CleanRun(runner, task),
        neutral=neutral and CleanRun(runner, neutral_prompt(model, neutral)),
    )


@pytest.fixture(scope="module")
def toy_trials(toy_model, toy_users):
    return [trial_of(toy_model, toy_users, user.discovery_examples()[-1]) for user in toy_users]


@pytest.fixture(scope="module")
def llama_trials(tinies, probe, short):
    model = tinies("llama").hooked
    return [trial_of(model, probe, user.discovery_examples()[-1], short, donors=2, neutral=TEXT) for user in probe[:4]]


@pytest.fixture(scope="module")
def six_trials(tinies, probe, short):
    model = tinies("qwen3").hooked
    return [trial_of(model, probe, user.discovery_examples()[-1], short, donors=2) for user in probe[:6]]


def bootstraps(n_users, n, seed=0):
    """All users, and so many draws of them with replacement, as weights."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.ones(n_users)]
    rows += [
        torch.bincount(torch.randint(n_users, (n_users,), generator=generator), minlength=n_users) for _ in range(n)
    ]
    return torch.stack([row / row.sum() for row in rows])


def gain_of(trials, weights, mask):
    """Of one set, by plain ablation: the mean of what is lost and what is brought back."""
    total = 0.0
    for trial, weight in zip(trials, weights.tolist(), strict=True):
        lost = [float(run.ablated(mask[None])) - run.value for run in trial.necessity]
        back = [run.value - float(run.ablated(mask[None])) for run in trial.sufficiency]
        total += weight * (sum(lost) / len(lost) + sum(back) / len(back)) / 2
    return total


def cost_of(runs, weights, mask):
    pairs = zip(runs, weights.tolist(), strict=True)
    return sum(weight * (float(run.ablated(mask[None])) - run.value) for run, weight in pairs)


def test_causal_head_gates_are_those_of_the_published_package(llama, probe):
    package = pytest.importorskip("causal_head_gating", reason="needs nam-causal-head-gating")
    model, steps = llama.hooked, 25
    prompts = [build_prompt(model, user.examples[0]) for user in probe[:4]]
    # The package's batches hold prompts of one length.
    length, n_response = 70, 6
    prompts = [cut(prompt, length, n_response) for prompt in prompts]
    start = torch.linspace(-1.5, 1.5, 12).reshape(3, 4)[:, [2, 0, 3, 1]]
    masks = torch.zeros(len(prompts), length, dtype=torch.bool)
    masks[:, -n_response:] = True
    dataset = package.MaskedSequenceDataset(
        pad_token_id=-1, input_ids=torch.stack([prompt.tokens for prompt in prompts]), loss_masks=masks
    )
    trainer = package.CHGTrainer(llama.plain, dataset, batch_size=len(prompts))
    trainer.mask_logits.data.copy_(start)
    frozen = [parameter.requires_grad_(False) for parameter in llama.plain.parameters()]
    before = torch.get_autocast_dtype("cpu")
    # The trainer runs under autocast, which knows no float32 on a CPU and then stays off.
    torch.set_autocast_dtype("cpu", torch.float32)
    try:
        for _ in trainer.fit(num_updates=steps, num_reg_updates=steps, verbose=False):
            pass
    finally:
        torch.set_autocast_dtype("cpu", before)
        for parameter in frozen:
            parameter.requires_grad_(True)
    config = GatingConfig(steps=steps, pulled_steps=steps)
    ours = causal_head_gates(model, prompts, start=start, config=config)
    theirs = trainer.get_final_masks()
    assert float((ours.free - start.sigmoid()).abs().max()) > 0.2
    torch.testing.assert_close(ours.free, theirs["unregularized"], atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.open, theirs["necessary"], atol=1e-3, rtol=0)
    torch.testing.assert_close(ours.closed, theirs["sufficient"], atol=1e-3, rtol=0)


def cut(prompt, length, n_response):
    """The last tokens of a prompt, of which some are the response."""
    from dataclasses import replace

    start, stop = prompt.spans["response"]
    assert stop - start >= n_response
    stop = start + n_response
    spans = {"profile": (0, 0), "task": (0, length - n_response), "response": (length - n_response, length)}
    return replace(prompt, tokens=prompt.tokens[stop - length : stop], spans=spans)


def test_roles_are_those_of_table_1():
    gates = CausalGates(torch.zeros(1, 3), torch.tensor([[0.9, 0.1, 0.95]]), torch.tensor([[0.8, 0.05, 0.1]]))
    torch.testing.assert_close(gates.facilitating, torch.tensor([[0.8, 0.05, 0.1]]))
    torch.testing.assert_close(gates.interfering, torch.tensor([[0.1, 0.9, 0.05]]))
    torch.testing.assert_close(gates.irrelevant, torch.tensor([[0.18, 0.095, 0.855]]))
    assert {name: str(heads) for name, heads in gates.roles().items()} == {
        "facilitating": "L0H0",
        "interfering": "L0H1",
        "irrelevant": "L0H2",
    }


def test_slopes_are_those_of_finite_differences(llama_trials):
    trial, eps = llama_trials[0], 5e-3
    soft = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    measures = {
        "gain": lambda one: soft_gain(trial, one),
        "gain of the other": lambda one: soft_gain(trial, one, 1),
        "task": lambda one: soft_cost(trial, "task_cost", one),
        "neutral": lambda one: soft_cost(trial, "neutral_cost", one),
    }
    for name, measure in measures.items():
        slope = measure(soft)[1]
        assert float(slope.abs().max()) > 0.05, name
        for head in ((0, 1), (1, 3), (2, 0)):
            step = torch.zeros(3, 4)
            step[head] = eps
            numeric = (measure(soft + step)[0] - measure(soft - step)[0]) / (2 * eps)
            torch.testing.assert_close(slope[:, head[0], head[1]].double(), numeric, atol=2e-3, rtol=2e-2)


def test_soft_sets_end_in_hard_ones(llama_trials):
    trial = llama_trials[1]
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[0, 1, :2] = mask[0, 2, 3] = True
    mean = sum(float(soft_gain(trial, mask.float(), turn)[0]) for turn in range(2)) / 2
    assert mean == pytest.approx(gain_of([trial], torch.ones(1), mask[0]), abs=1e-5)
    assert float(soft_cost(trial, "neutral_cost", mask.float())[0]) == pytest.approx(
        cost_of([trial.neutral], torch.ones(1), mask[0]), abs=1e-5
    )
    assert float(soft_gain(trial, torch.zeros(1, 3, 4))[0]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("k", [1, 3, 11])
def test_memberships_keep_the_budget(k):
    scores = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(k)).double() * 6
    scores[3] -= 30
    soft = memberships(scores, k)
    assert (soft[:3].sum((-1, -2)) <= k + 1e-4).all()
    for one, found in zip(scores, soft, strict=True):
        shift = found.logit() - one
        spread = shift.max() - shift.min()
        assert float(spread) < 1e-2
        assert float(shift.max()) < 1e-5
        # Either the budget binds, or nothing is shifted.
        assert float(found.sum()) == pytest.approx(k, abs=1e-3) or float(shift.abs().max()) < 1e-5


def test_the_carrier_is_found_in_every_bootstrap(toy_trials):
    fits = Gates().fit(toy_trials, bootstraps(len(toy_trials), 6), 1, Bounds(), 0)
    assert len(fits) == 7
    for fit in fits:
        assert fit.heads.heads == (CARRIER,)
        assert divmod(int(fit.values.argmax()), 4) == tuple(CARRIER)
    assert fits[0].roles["facilitating"].heads == (CARRIER,)
    assert all(not fit.roles for fit in fits[1:])


def test_fits_of_one_batch_do_not_meet(llama_trials):
    finder, weights = Gates(visits=2, trials=2, role_steps=4), bootstraps(4, 2, seed=3)
    bounds = Bounds(task_cost=0.05)
    together = finder.fit(llama_trials, weights, 3, bounds, 0)
    for row, fit in enumerate(together):
        (alone,) = finder.fit(llama_trials, weights[row : row + 1], 3, bounds, 0)
        assert alone.heads == fit.heads
        torch.testing.assert_close(alone.values, fit.values, atol=1e-5, rtol=1e-5)


def subsets(k):
    heads = [(layer, head) for layer in range(CFG.n_layers) for head in range(CFG.n_heads)]
    sets = [chosen for size in range(1, k + 1) for chosen in itertools.combinations(heads, size)]
    return torch.stack([HeadSet(chosen).mask(CFG) for chosen in sets])


@pytest.mark.full
def test_sets_are_nearly_the_best_of_all_and_keep_their_bounds(six_trials):
    """Beside every set of at most three heads, measured by plain ablation."""
    weights, every = bootstraps(len(six_trials), 2), subsets(3)
    gains = torch.stack(
        [
            sum((run.ablated(every) - run.value for run in trial.necessity), torch.zeros(())) / 4
            - sum((run.ablated(every) - run.value for run in trial.sufficiency), torch.zeros(())) / 4
            for trial in six_trials
        ]
    )
    costs = torch.stack([trial.task.ablated(every) - trial.task.value for trial in six_trials])
    gains, costs = weights.double() @ gains, weights.double() @ costs
    # Half of what the best set of each fit costs, so that the bounds bind.
    bound = float(costs.gather(1, gains.argmax(1, keepdim=True)).mean()) / 2
    assert bound > 0.02
    free = Gates(role_steps=0).fit(six_trials, weights, 3, Bounds(), 0)
    kept = Gates(role_steps=0).fit(six_trials, weights, 3, Bounds(task_cost=bound), 0)
    n_broken = 0
    for row in range(len(weights)):
        index = [int((every == fit.heads.mask(CFG)).all((-1, -2)).nonzero()) for fit in (free[row], kept[row])]
        assert float(gains[row, index[0]]) >= 0.95 * float(gains[row].max())
        assert float(costs[row, index[1]]) <= bound
        assert float(gains[row, index[1]]) >= 0.75 * float(gains[row][costs[row] <= bound].max())
        n_broken += float(costs[row, index[0]]) > bound
    assert n_broken


def test_a_bound_on_neutral_text_needs_neutral_text(toy_trials):
    with pytest.raises(ScoreError, match="no neutral text"):
        Gates().fit(toy_trials, bootstraps(len(toy_trials), 0), 1, Bounds(neutral_cost=0.1), 0)


def test_find_heads_by_gates(toy_model, toy_users):
    config = dps.FindConfig(n_bootstraps=4, n_donors=1)
    found = dps.find_heads(toy_model, toy_users, 1, method="gates", max_examples=1, find_config=config)
    assert found.heads.heads == (CARRIER,)
    assert all(heads.heads == (CARRIER,) for heads in (*found.by_fold, *found.resampled))
    assert len(found.by_fold) > 1
    assert len(found.resampled) == 4
    assert found.roles["facilitating"].heads == (CARRIER,)
    assert found.manifest["method"]["name"] == "gates"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Gates(visits=0), "visits"),
        (lambda: Gates(memory=1.0), "memory"),
        (lambda: Gates(sharpness=(4.0, -1.0)), "sharpness"),
        (lambda: GatingConfig(pull=0.0), "pull"),
        (lambda: GatingConfig(runs=0), "runs"),
        (lambda: CausalGates(*torch.zeros(3, 2, 3, 4)).roles(), "found \\[2, 3, 4\\]"),
    ],
)
def test_settings_that_cannot_be(make, said):
    with pytest.raises(ScoreError, match=said):
        make()


def test_causal_head_gates_towards_a_counterfactual_tell_the_carrier(toy_model, toy_users):
    examples = [user.discovery_examples()[-1] for user in toy_users]
    own = [build_prompt(toy_model, example) for example in examples]
    others = [prompts_in(toy_model, example, "other_user", toy_users)[0] for example in examples]
    config = GatingConfig(steps=10, pulled_steps=20, lr=0.4)
    # Half-open gates, and steps that are small beside the clip: what is pulled can come all the way.
    gates = causal_head_gates(
        toy_model, own, counterfactuals=others, positions="response", start=torch.zeros(2, 4), config=config
    )
    assert gates.roles()["facilitating"].heads == (CARRIER,)
    assert len(gates.roles()["irrelevant"]) == 7
    with pytest.raises(ScoreError, match="6 and 1 counterfactuals"):
        causal_head_gates(toy_model, own, counterfactuals=others[:1])
