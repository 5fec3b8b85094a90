"""`patch_paths`: what it says of models whose paths are known, beside a plain computation, and as a result."""

import numpy as np
import plants
import pytest
import torch
from conftest import no_hooks_left
from direct import PROMPT, SENDERS, Case, add_write, blocks_of, written_by_hand
from oracles import columns_replaced, nll

import dps_lens as dps
from dps_lens.data.conditions import donors_of
from dps_lens.errors import HeadError, RunError, ScoreError
from dps_lens.heads import Head, HeadSet

EVERYTHING = HeadSet((layer, head) for layer in range(plants.N_LAYERS) for head in range(plants.N_HEADS))
PLANTED = {
    "one": {("L1H2", "logits", "resid")},
    # Without the first, the backup writes; it stands back for what the first has written.
    "redundant": {("L0H1", "logits", "resid"), ("L0H1", "L2H3", "q")},
    "chain": {("L0H2", "L1H1", "q"), ("L1H1", "logits", "resid")},
    "harmful": {("L1H2", "logits", "resid")},
    "style_topic": {("L1H0", "logits", "resid"), ("L2H2", "logits", "resid")},
}


@pytest.fixture(scope="module")
def graphs(planted):
    """All paths between all heads of a planted model, once."""
    made = {}

    def get(name):
        if name not in made:
            one = planted(name)
            made[name] = dps.patch_paths(one.model, one.users, EVERYTHING, EVERYTHING)
            assert no_hooks_left(one.model)
        return made[name]

    return get


@pytest.mark.parametrize("name", plants.NAMES)
def test_the_edges_that_survive_are_those_that_were_planted(graphs, name):
    """All pairs of heads, into q, k and v, and all documents: 12 · 11 / 2 pairs of three layers, and no false edge."""
    frame = graphs(name).edges()
    found = frame[frame["survives"]]
    edges = set(zip(found["source"], found["target"], found["into"], strict=True))
    assert {edge for edge in edges if not edge[0].startswith("document")} == PLANTED[name]
    readers = {target for source, target, _ in edges if source.startswith("document")}
    assert readers <= {str(head) for head in map(Head._make, plants.CARRIERS[name])}
    into_logits = found[found["target"] == "logits"]
    assert (into_logits["effect"] > 1).all()


def test_a_backup_shows_as_a_direct_effect_without_a_total_one(graphs):
    frame = graphs("redundant").heads_frame().set_index("head")
    assert frame.loc["L0H1", "direct"] > 2
    assert abs(frame.loc["L0H1", "total"]) < 0.1
    chain = graphs("chain").heads_frame().set_index("head")
    assert chain.loc["L0H2", "total"] > 1
    assert abs(chain.loc["L0H2", "direct"]) < 0.05


def test_a_path_between_heads_is_two_edits_of_the_plain_model(tinies, probe):
    users, receiver = probe[:2], Head(2, 1)
    case = Case(tinies("llama"), users)
    found = dps.patch_paths(
        case.tiny.hooked, users, HeadSet(SENDERS), HeadSet([receiver]), into="resid", prompt_config=PROMPT
    )
    assert found.example_ids[0] == users[0].examples[-1].id == case.own.example_id
    assert [user.id for user in donors_of(users[0].examples[-1], users, 1, 0)] == [users[1].id]
    block = blocks_of(case.tiny.plain)[receiver.layer]
    for place, sender in enumerate(SENDERS):
        z = case.z_with(receiver, [add_write(case, block, written_by_hand(case, sender))])
        expected = case.nll_with(receiver, z) - case.run.value
        assert float(found.paths[0, 0, place, 0]) == pytest.approx(expected, abs=1e-5)
        with columns_replaced(
            case.tiny.plain, sender.layer, sender.head, case.cfg.d_head, case.positions, case.other_z(sender)
        ):
            patched = nll(case.tiny.plain, case.own) - case.run.value
        assert float(found.total[0, place]) == pytest.approx(patched, abs=1e-5)


def test_the_graph_is_kept_resumed_and_drawn(graphs, planted, tmp_path):
    one, effects = planted("chain"), graphs("chain")
    effects.save(tmp_path)
    again = dps.PathEffects.load(tmp_path)
    assert torch.equal(again.paths.nan_to_num(), effects.paths.nan_to_num())
    assert again.edges().equals(effects.edges())
    assert again.controls == effects.controls
    figure = effects.plot()
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len(lines) == int(effects.edges()["survives"].sum())
    assert "survive" in figure.layout.title.text
    asked = (one.model, one.users[:2], HeadSet.parse("L0H2"), HeadSet.parse("L1H1"))
    first = dps.patch_paths(*asked, out=tmp_path / "run")
    assert torch.equal(dps.patch_paths(*asked, out=tmp_path / "run").total, first.total)
    with pytest.raises(RunError):
        dps.patch_paths(*asked, out=tmp_path / "run", seed=1)
    assert first.edges()["p"].isna().all(), "two users allow no claim"
    assert not first.edges()["survives"].any()
    assert "it takes six users" in first.plot().layout.title.text
    assert "L0H2" not in {str(head) for head in first.controls["L0H2"]}


def test_paths_that_run_upwards_are_not_there(graphs):
    effects = graphs("chain")
    layers = torch.tensor([head.layer for head in effects.receivers])
    for place, head in enumerate(effects.writers):
        missing = effects.paths[:, :, place].isnan()
        assert bool((missing == (layers <= head.layer)).all())
    assert not np.isnan(effects.edges()["effect"]).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"into": "z"}, "q, k, v, resid"),
        ({"into": ()}, "empty"),
        ({"against": "nobody"}, "other_user"),
        ({"n_random": 0}, "n_random"),
        ({"senders": HeadSet()}, "at least one sender"),
        ({"users": slice(0, 1)}, "two users"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_right_is_refused(planted, change, said):
    one = planted("one")
    users = one.users[change.pop("users", slice(0, 2))]
    asked = {"senders": HeadSet.parse("L0H0"), "receivers": HeadSet.parse("L1H2")} | change
    with pytest.raises(ScoreError, match=said):
        dps.patch_paths(one.model, users, **asked)


@pytest.mark.usefixtures("unchecked")
def test_scores_and_lists_are_no_sets(planted):
    one = planted("one")
    for wrong in (["L1H2"], Head(1, 2), dps.score_heads(one.model, one.users[:2], max_examples=1)):
        with pytest.raises(ScoreError, match=r"scores\.top"):
            dps.patch_paths(one.model, one.users[:2], wrong, HeadSet.parse("L1H2"))


def test_found_heads_bring_their_prompts(planted):
    one, short = planted("one"), dps.PromptConfig(items=2, profile_tokens=40)
    found = dps.find_heads(one.model, one.users[:3], 1, method="rank", max_examples=1, prompt_config=short)
    effects = dps.patch_paths(one.model, one.users[:2], found, found)
    assert effects.manifest["prompt_config"]["items"] == 2
    assert effects.documents.shape[-1] == 2
    with pytest.raises(ScoreError, match="prompt_config"):
        dps.patch_paths(one.model, one.users[:2], found, found, prompt_config=dps.PromptConfig(items=3))


def test_a_level_that_no_p_reaches_is_refused(graphs):
    with pytest.raises(ScoreError, match="lies below"):
        graphs("one").edges(alpha=1e-4)


def test_heads_outside_the_model_and_heads_found_here_are_refused(planted):
    one = planted("one")
    with pytest.raises(HeadError, match="L9H0"):
        dps.patch_paths(one.model, one.users, HeadSet.parse("L0H0"), HeadSet.parse("L9H0"))
    example = one.users[0].examples[-1]
    found = dps.FoundHeads(
        HeadSet.parse("L1H2"),
        torch.zeros(plants.N_LAYERS, plants.N_HEADS),
        example_ids=(example.id,),
        user_ids=(example.user_id,),
    )
    with pytest.raises(ScoreError, match="chosen on 1 of these examples"):
        dps.patch_paths(one.model, one.users, found, found)
