"""The same answers on a GPU."""

import pytest
import torch
from flat import generate
from pcs import score_pcs

import dps_lens as dps
from dps_lens.heads import HeadSet
from dps_lens.steering.continuous import ContinuousBatch, Writing
from dps_lens.steering.plan import plan_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here")

SETS = [HeadSet.parse("L0H1,L2H3"), HeadSet.parse("L1H0")]
RULES = (
    "dps", "dps-entropy", "dps-js", "dps-patch", "decore", "cad", "adacad", "dola", "amplify", "vector", "head_vector",
    "dps+cad",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_folders):
    """On the CPU, and on the GPU in two number formats; exact products, so that tokens can be compared."""
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = str(tiny_folders["llama"])
    return {
        "cpu": dps.load_model(folder, device="cpu"),
        "cuda": dps.load_model(folder, device="cuda", dtype="float32"),
        "bfloat16": dps.load_model(folder, device="cuda"),
    }


def vectors_of(model, rule):
    """Of the residual stream, or of heads, one a row."""
    if "head_vector" not in rule:
        return [dps.SteeringVector(torch.linspace(-1, 1, model.cfg.d_model), layer) for layer in (0, 2)]
    shape = (model.cfg.n_layers, model.cfg.n_heads)
    values = [torch.linspace(-1, 1, len(one) * model.cfg.d_head).reshape(len(one), -1) for one in SETS]
    return [dps.HeadVector(each, HeadSet(one, shape=shape)) for each, one in zip(values, SETS, strict=True)]


def written(model, users, rule, **options):
    own, none = ([dps.build_prompt(model, user.examples[0], which) for user in users] for which in ("own", "none"))
    return generate(
        model,
        own,
        rule=rule,
        heads=SETS,
        gamma=[0.7, 1.5],
        vectors=vectors_of(model, rule),
        max_new_tokens=6,
        negative_prompts=none,
        stop_at_eos=False,
        **options,
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7, "seed": [1, 2]}])
def test_rules_write_the_same_tokens(models, probe, rule, sampling):
    one, other = (written(models[name], [probe[0], probe[5]], rule, **sampling) for name in ("cpu", "cuda"))
    for row in range(2):
        assert other.tokens[row].tolist() == one.tokens[row].tolist()
        assert torch.allclose(other.kl[row], one.kl[row], atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("rule", ["dps", "cad", "dps-patch"])
def test_a_target_of_kl_is_reached(models, probe, rule):
    one, other = (written(models[name], [probe[0], probe[5]], rule, target_kl=0.1) for name in ("cpu", "cuda"))
    for row in range(2):
        assert other.tokens[row].tolist() == one.tokens[row].tolist()
        assert torch.allclose(other.kl[row], one.kl[row], atol=1e-3)


@pytest.mark.parametrize("recipe", ["difference", "probe", "persona"])
def test_head_vectors_are_the_same(models, probe, recipe):
    options = {"recipe": recipe, "max_examples": 2}
    made = [dps.head_vectors(models[name], probe[:3], SETS[0], **options).vectors for name in ("cpu", "cuda")]
    assert torch.allclose(made[1], made[0], atol=1e-3)
    found = dps.head_vectors(models["bfloat16"], probe[:3], SETS[0], **options).vectors
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("rule", RULES)
def test_rules_run_in_bfloat16(models, probe, rule):
    out = written(models["bfloat16"], [probe[0], probe[5]], rule)
    assert [len(tokens) for tokens in out.tokens] == [6, 6]
    assert all(bool(values.isfinite().all()) for values in out.logprobs)


@pytest.mark.parametrize("method", ["exact", "attribution", "integrated"])
@pytest.mark.parametrize("positions", ["response", "all"])
def test_scores_are_the_same(models, probe, method, positions):
    options = {"method": method, "positions": positions, "max_examples": 1}
    one, other = (score_pcs(models[name], [probe[0]], **options) for name in ("cpu", "cuda"))
    assert torch.allclose(one.values, other.values.cpu(), atol=1e-4)


def test_patched_scores_are_the_same(models, probe):
    users = [probe[0], probe[5]]
    one, other = (dps.score_heads(models[name], users, max_examples=1) for name in ("cpu", "cuda"))
    assert torch.allclose(one.values, other.values.cpu(), atol=1e-4)
    rounded = dps.score_heads(models["bfloat16"], users, max_examples=1)
    assert float((rounded.values.cpu() - one.values).abs().max()) < 0.1 * float(one.values.abs().max())


def test_paths_and_dossiers_are_the_same(models, probe):
    users, heads = [probe[0], probe[5]], SETS[0]
    one, other = (dps.patch_paths(models[name], users, heads, heads) for name in ("cpu", "cuda"))
    for name in ("paths", "direct", "total", "documents"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-3, equal_nan=True), name
    one, other = (dps.describe_head(models[name], users, heads[0], n_random=1) for name in ("cpu", "cuda"))
    assert torch.allclose(one.values, other.values, atol=1e-3)
    assert bool(dps.describe_head(models["bfloat16"], users, heads[0], n_random=1).values.isfinite().all())
    assert bool(dps.patch_paths(models["bfloat16"], users, heads, heads).total.isfinite().all())


@pytest.mark.parametrize("kind", ["copying", "copy_suppression", "profile_retrieval", "style_modulation"])
def test_families_are_the_same(models, probe, kind):
    users, atol = [probe[0], probe[5]], {"profile_retrieval": 1e-3, "style_modulation": 0.02}
    of_users = {"profile_retrieval": dps.ProfileRetrieval, "style_modulation": dps.StyleModulation}
    family = of_users[kind](users) if kind in of_users else dps.Copying(kind, n_tokens=70)
    one, other = (dps.reference_heads(models[name], [family], cache=False)[kind] for name in ("cpu", "cuda"))
    assert torch.allclose(one.values, other.values, atol=atol.get(kind, 0.05))


def asked(model, users, rule):
    own, none = ([dps.build_prompt(model, user.examples[0], which) for user in users] for which in ("own", "none"))
    given = {"prompts": own, "rule": rule, "max_new_tokens": 12}
    parts = rule.split("+")
    if {"dps", "dps-entropy", "dps-js", "dps-patch", "decore", "amplify"} & {*parts}:
        given["heads"] = [SETS[index % 2] for index in range(len(users))]
    if {"cad", "adacad", "dps-patch"} & {*parts}:
        given["negative_prompts"] = none
    if "vector" in rule:
        vectors = vectors_of(model, rule)
        given["vectors"] = [vectors[index % 2] for index in range(len(users))]
    return given


@pytest.mark.parametrize("rule", RULES)
def test_compiled_steps_write_the_same_tokens(models, probe, rule, unchecked):
    """Twice, so that the second batch finds the graph and the cache of the first; and with rows that leave."""
    model = models["cuda"]
    for users in (probe[:2], probe[2:4], probe[:5]):
        given = asked(model, users, rule)
        eager, ours = (
            dps.generate(model, decode_config=dps.DecodeConfig(compile=compiled, stop_at_eos=False), **given)
            for compiled in (False, True)
        )
        assert [row.tolist() for row in ours.tokens] == [row.tolist() for row in eager.tokens]


def test_the_compiled_step_is_one_graph_on_the_device(models, probe, unchecked):
    from torch._dynamo.utils import counters

    model = models["cuda"]
    counters.clear()
    for rule in ("dps", "dola"):
        dps.generate(model, decode_config=dps.DecodeConfig(compile=True), **asked(model, probe[:2], rule))
    assert not counters["inductor"]["cudagraph_skips"]


def test_compiled_streams_side_by_side(models, probe, unchecked):
    model, config = models["cuda"], dps.DecodeConfig(compile=True, stop_at_eos=False)
    given = asked(model, probe[:2], "dps")
    whole = dps.generate(model, decode_config=dps.DecodeConfig(stop_at_eos=False), **given).texts
    streams = [dps.generate(model, decode_config=config, stream=True, **given) for _ in "ab"]
    texts = [[""] * 2, [""] * 2]
    for pieces in zip(*map(iter, streams), strict=True):
        for text, (row, piece) in zip(texts, pieces, strict=True):
            text[row] += piece
    assert texts == [whole, whole]


@pytest.mark.parametrize("rule", RULES)
def test_requests_that_join_a_batch_write_the_same_tokens(models, probe, rule):
    model = models["cuda"]
    calls = [
        asked(model, [user], rule) | {"max_new_tokens": n} for user, n in zip(probe[:4], (12, 3, 9, 6), strict=True)
    ]
    batch, writings = ContinuousBatch(model, chunk=100), [Writing(plan_of(model, **one)) for one in calls]
    for one in writings:
        batch.add(one)
        batch.step()
    while len(batch):
        batch.step()
    for writing, one in zip(writings, calls, strict=True):
        written = [int(token) for token in writing.steps.columns["tokens"][0]]
        assert written == dps.generate(model, **one).tokens[0].tolist()
