"""Clusters of users: planted groups are found, and no user's own scores choose that user's heads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from dps_lens.data import Document, Example, User
from dps_lens.data.tasks import TASKS
from dps_lens.errors import DataError, HeadError, ScoreError
from dps_lens.heads import Head
from dps_lens.scores import HeadScores
from dps_lens.stats.groups import cluster_users

TASK = TASKS["lamp-4"]
TOPICS = (
    ["loaf", "crust", "flour", "yeast", "oven", "dough", "crumb", "starter"],
    ["saddle", "pedal", "chain", "spoke", "wheel", "tyre", "brake", "gear"],
    ["heron", "finch", "nest", "plumage", "wing", "beak", "perch", "song"],
)
PLANTED = [2, 0, 1, 1, 0, 2, 2, 0, 1]
METHODS = pytest.mark.parametrize("method", ["kmeans", "hierarchical"])


def writer(name, topic, seed=0, documents=4):
    rng = np.random.default_rng([seed, topic])
    words = [*TOPICS[topic], "the", "and", "with", "again"]

    def text(n):
        return " ".join(rng.choice(words, n))

    history = tuple(
        Document(f"{name}-{i}", {"title": text(4), "text": text(30)}, f"2020-01-0{i + 1}") for i in range(documents)
    )
    example = Example(f"{name}-new", name, TASK, f"Generate a headline for the article: {text(30)}", text(4), history)
    return User(name, TASK, history, (example,))


def writers():
    return [writer(f"u{index}", topic, seed=index) for index, topic in enumerate(PLANTED)]


def planted_scores(groups=tuple(PLANTED), *, examples=3, noise=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(groups) + 1, 4, 5, generator=generator)
    values = torch.cat([centres[g] + noise * torch.randn(examples, 4, 5, generator=generator) for g in groups])
    owners = [f"u{user}" for user in range(len(groups)) for _ in range(examples)]
    return HeadScores(values, example_ids=[str(i) for i in range(len(owners))], user_ids=owners)


def letters(texts):
    """A sentence encoder in miniature: how often each letter occurs."""
    return torch.tensor([[text.count(chr(97 + i)) for i in range(26)] for text in texts], dtype=torch.bfloat16)


def user_mean(scores, user):
    return np.mean(
        [v.double().numpy() for v, owner in zip(scores.values, scores.user_ids, strict=True) if owner == user], 0
    )


@METHODS
@pytest.mark.parametrize("by", ["tfidf", "scores", letters])
def test_planted_clusters_are_found(by, method):
    users, scores = (None, planted_scores()) if by == "scores" else (writers(), None)
    found = cluster_users(users, 3, by=by, scores=scores, method=method)
    assert adjusted_rand_score(PLANTED, found.labels) == 1
    assert list(dict.fromkeys(found.labels)) == [0, 1, 2]
    assert found.members(0) == ("u0", "u5", "u6")
    assert found.members(3) == ()
    assert np.linalg.norm(found.features, axis=1) == pytest.approx(1)
    assert found.centres[1] == pytest.approx(found.features[[1, 4, 7]].mean(0))
    frame = found.to_frame()
    assert list(frame["user"]) == [f"u{i}" for i in range(9)]
    assert list(frame["cluster"]) == list(found.labels)
    assert found.manifest["method"] == method
    assert found.manifest["by"] == (by if isinstance(by, str) else "letters")


@METHODS
def test_the_same_seed_gives_the_same_clusters(method):
    scores = planted_scores((0,) * 12, noise=1.0)
    one, two = (cluster_users(None, 4, by="scores", scores=scores, method=method, seed=3) for _ in range(2))
    assert list(one.labels) == list(two.labels)
    assert set(one.labels) == {0, 1, 2, 3}


@METHODS
def test_as_many_clusters_as_users_and_a_single_one(method):
    assert list(cluster_users(writers(), 9, method=method).labels) == list(range(9))
    assert set(cluster_users(writers(), 1, method=method).labels) == {0}
    assert list(cluster_users(writers()[:1], 1, method=method).labels) == [0]


def test_routing_weights():
    found = cluster_users(writers(), 3)
    user = writers()[1]
    soft, hard = found.route(user), found.route(user, hard=True)
    cosine = found.centres @ found.features[1] / np.linalg.norm(found.centres, axis=1)
    assert soft == pytest.approx(np.exp(cosine / 0.1) / np.exp(cosine / 0.1).sum(), rel=1e-5)
    assert soft.sum() == pytest.approx(1)
    assert list(hard) == [0, 1, 0]
    assert soft.argmax() == 1
    assert found.route(user, temperature=1e-4) == pytest.approx(hard)
    assert found.route(user, temperature=1e9) == pytest.approx(1 / 3)
    for same in ("u1", found.features[1], torch.from_numpy(found.features[1]) * 7):
        assert found.route(same) == pytest.approx(soft, rel=1e-5)


@pytest.mark.parametrize("by", ["tfidf", letters])
def test_a_new_user_is_routed_by_text(by):
    found = cluster_users(writers(), 3, by=by)
    for topic, cluster in ((2, 0), (0, 1), (1, 2)):
        assert found.route(writer("new", topic, seed=99), hard=True)[cluster] == 1


def test_a_new_user_is_routed_by_a_map():
    scores = planted_scores((*PLANTED, 1))
    old = HeadScores(scores.values[:-3], example_ids=scores.example_ids[:-3], user_ids=scores.user_ids[:-3])
    found = cluster_users(None, 3, by="scores", scores=old)
    assert found.route(scores.mean("u9"), hard=True)[found.labels[2]] == 1
    assert found.route(100 * scores.mean("u9")) == pytest.approx(found.route(scores.mean("u9").flatten()))
    assert found.route(writers()[2]) == pytest.approx(found.route("u2"))
    with pytest.raises(ScoreError, match=r"'new' is not a member.* by a \[layer, head\] map"):
        found.route(writer("new", 0))
    with pytest.raises(ScoreError, match=r"shape \(5, 4\) does not fit; give \(20,\) or \(4, 5\)"):
        found.route(scores.mean("u9").T)


def test_evaluation_texts_have_no_influence():
    users = writers()
    found = cluster_users(users, 3)
    other = [replace(u, examples=(replace(u.examples[0], input="xyzzy plugh", reference="foo bar"),)) for u in users]
    assert (cluster_users(other, 3).features == found.features).all()
    # A history that repeats what an evaluation example asks for is read without that document.
    leaking = [
        replace(u, history=(*u.history, Document("leak", {"title": u.examples[0].reference, "text": "secret"}, "2021")))
        for u in users
    ]
    again = cluster_users(leaking, 3)
    assert (again.features == found.features).all()
    assert "secret" not in again.encoder.vocabulary_
    assert again.manifest["documents"]["u0"] == [f"u0-{i}" for i in range(4)]
    assert found.route(leaking[0]) == pytest.approx(found.route(users[0]))


def test_cluster_maps_equal_a_loop_over_members():
    # Uneven numbers of examples, users in another order, and one user who is in no cluster.
    scores, extra = planted_scores(), planted_scores((0, 1), examples=1, seed=5)
    scores = HeadScores(
        torch.cat([scores.values.flip(0), extra.values, torch.randn(1, 4, 5)]),
        example_ids=[str(i) for i in range(30)],
        user_ids=[*scores.user_ids[::-1], "u0", "u1", "stranger"],
    )
    found = cluster_users(writers(), 3)
    for without in (None, "u0", "u7"):
        maps = found.scores(scores, without=without)
        for cluster in range(3):
            members = [user for user in found.members(cluster) if user != without]
            expected = np.mean([user_mean(scores, user) for user in members], 0)
            assert maps[cluster].numpy() == pytest.approx(expected)
    weights = found.route("u7")
    mixed = found.head_weights(scores, user="u7")
    expected = sum(w * m for w, m in zip(weights, found.scores(scores, without="u7").numpy(), strict=True))
    assert mixed.numpy() == pytest.approx(expected)
    assert torch.allclose(found.head_weights(scores, user=writers()[7]), mixed, rtol=1e-5)
    new = writer("new", 1, seed=99)
    expected = np.einsum("c,clh->lh", found.route(new, temperature=0.5), found.scores(scores).numpy())
    assert found.head_weights(scores, user=new, temperature=0.5).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("by", ["tfidf", "scores"])
@pytest.mark.parametrize("route", ["hard", "soft"])
def test_a_users_scores_do_not_choose_the_users_heads(route, by):
    scores = planted_scores()
    found = cluster_users(writers(), 3, by=by, scores=scores if by == "scores" else None)
    heads = found.heads(scores, 4, route=route)
    assert list(heads) == [f"u{i}" for i in range(9)]
    for row, user in enumerate(heads):
        changed = scores.values.clone()
        changed[scores.rows(user)] += 50 * torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(row))
        other = HeadScores(changed, example_ids=scores.example_ids, user_ids=scores.user_ids)
        assert found.heads(other, 4, route=route)[user].heads == heads[user].heads
    fellows = [user_mean(scores, user) for user in ("u5", "u6")]
    if route == "hard":
        best = np.argsort(-np.mean(fellows, 0).flatten(), kind="stable")[:4]
        assert heads["u0"].heads == tuple(Head(int(i) // 5, int(i) % 5) for i in best)
        assert [h.label for h in heads.values()] == [f"cluster {c}" for c in found.labels]
    else:
        weights = found.head_weights(scores, user="u0")
        assert heads["u0"].heads[0] == Head(*divmod(int(weights.argmax()), 5))
        assert heads["u0"].label == "soft"
    assert heads["u0"].shape == (4, 5)


def test_a_user_alone_borrows_from_all_others():
    scores = planted_scores((0, 0, 0, 1))
    found = cluster_users(None, 2, by="scores", scores=scores)
    assert found.manifest["alone"] == ["u3"]
    assert found.scores(scores, without="u3")[1].isnan().all()
    others = torch.stack([scores.mean(f"u{i}") for i in range(3)]).mean(0)
    ranked = HeadScores(others[None], example_ids=["0"], user_ids=["0"]).top(6)
    hard, soft = (found.heads(scores, 6, route=route, temperature=1e-3) for route in ("hard", "soft"))
    assert hard["u3"].heads == soft["u3"].heads == ranked.heads
    assert [h.label for h in hard.values()] == ["cluster 0"] * 3 + ["global"]
    assert [h.label for h in soft.values()] == ["soft"] * 3 + ["soft, alone"]
    assert torch.allclose(found.head_weights(scores, user="u3"), others)
    with pytest.raises(HeadError, match="21 of 20"):
        found.heads(scores, 21)
    single = planted_scores((0,))
    alone = cluster_users(None, 1, by="scores", scores=single)
    with pytest.raises(ScoreError, match="'u0' is the only member"):
        alone.heads(single, 3)


def test_ties_go_by_layer_then_head():
    scores = HeadScores(torch.ones(3, 2, 2), example_ids=list("abc"), user_ids=list("abc"))
    users = [replace(user, id=name) for user, name in zip(writers(), "abc", strict=False)]
    assert str(cluster_users(users, 1).heads(scores, 3)["a"]) == "L0H0,L0H1,L1H0"


@METHODS
def test_probe_users_can_be_clustered(probe, method):
    found = cluster_users(probe, 3, method=method)
    assert sum(len(found.members(cluster)) for cluster in range(3)) == len(probe) == 12
    if method == "kmeans":
        assert adjusted_rand_score([user.labels["style"] for user in probe], found.labels) == 1
    for user in probe:
        assert found.route(user).sum() == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_errors(unchecked):
    users, scores = writers(), planted_scores()
    for n in (0, -1, 10):
        with pytest.raises(ScoreError, match=f"{n} clusters of 9 users; ask for 1 to 9"):
            cluster_users(users, n)
    with pytest.raises(ScoreError, match="scores= goes with by='scores'"):
        cluster_users(users, 2, by="scores")
    with pytest.raises(ScoreError, match="need users"):
        cluster_users(None, 2)
    with pytest.raises(ScoreError, match="and only with it"):
        cluster_users(users, 2, scores=scores)
    with pytest.raises(ScoreError, match="by 'topic' is unknown"):
        cluster_users(users, 2, by="topic")
    with pytest.raises(ScoreError, match="method 'dbscan' is unknown"):
        cluster_users(users, 2, method="dbscan")
    with pytest.raises(DataError, match="two users are called 'u0'"):
        cluster_users([*users, users[0]], 2)
    with pytest.raises(ScoreError, match="1 users are not in the scores, such as 'new'"):
        cluster_users([*users, writer("new", 0)], 2, by="scores", scores=scores)
    for method in ("kmeans", "hierarchical"):
        with pytest.raises(ScoreError, match="only 2 users differ"):
            cluster_users([*users[:2], replace(users[0], id="copy")], 3, method=method)
    for fields in ({"title": " ", "text": ""}, None):
        history = (Document("d", fields),) if fields else ()
        with pytest.raises(DataError, match="history of user 'empty' has no words"):
            cluster_users([*users, User("empty", TASK, history, ())], 2)
    mute = User("mute", TASK, (Document("d", {"title": "a", "text": "b c"}),), ())
    with pytest.raises(DataError, match="history of user 'mute' has no words"):
        cluster_users([mute], 1)
    with pytest.raises(DataError, match=r"made \(3,\) of 4 texts"):
        cluster_users(users, 2, by=lambda texts: np.ones(3))
    undefined = HeadScores(scores.values / 0 * 0, example_ids=scores.example_ids, user_ids=scores.user_ids)
    with pytest.raises(ScoreError, match="not defined"):
        cluster_users(None, 2, by="scores", scores=undefined)


def test_errors_of_clusters(unchecked):
    found, scores = cluster_users(writers(), 3), planted_scores()
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ScoreError, match="is not positive"):
            found.route("u0", temperature=temperature)
    with pytest.raises(ScoreError, match="'u99' is not a member.* by a User"):
        found.route("u99")
    with pytest.raises(ScoreError, match="'u99' is not a member"):
        found.scores(scores, without="u99")
    with pytest.raises(ScoreError, match="does not fit"):
        found.route(scores.mean("u0"))
    with pytest.raises(ScoreError, match="route 'warm' is unknown"):
        found.heads(scores, 2, route="warm")
    fewer = HeadScores(scores.values[:3], example_ids=scores.example_ids[:3], user_ids=scores.user_ids[:3])
    for call in (found.scores, lambda s: found.heads(s, 2), lambda s: found.head_weights(s, user="u0")):
        with pytest.raises(ScoreError, match="8 users are not in the scores"):
            call(fewer)
    stranger = User("new", TASK, (Document("d", {"title": "zzz", "text": "qqq www"}),), ())
    with pytest.raises(DataError, match="'new' has no direction"):
        found.route(stranger)
