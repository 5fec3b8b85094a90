"""Dossiers of heads: of planted ones, and each number against a plain computation or transformer-lens."""

from dataclasses import replace

import plants
import pytest
import torch
from conftest import ARCHITECTURES, make_hf_model, make_tokenizer, no_hooks_left
from direct import Case

import dps_lens as dps
from dps_lens.dossier.circuits import output_circuits, readers
from dps_lens.dossier.describe import pieces_of, ranks_of
from dps_lens.dossier.measures import MEASURES, Look, attributed
from dps_lens.dossier.result import DIRECTION
from dps_lens.dossier.words import WordKinds
from dps_lens.errors import HeadError, RunError, ScoreError
from dps_lens.heads import Head
from dps_lens.model.final_norm import FinalNorm


@pytest.fixture(scope="module")
def case(tinies, probe):
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = Case(tinies(architecture), probe[:2])
        return made[architecture]

    return get


@pytest.fixture(scope="module")
def dossiers(planted):
    made = {}

    def get(name, head):
        if (name, head) not in made:
            one = planted(name)
            made[name, head] = dps.describe_head(one.model, one.users, head, n_random=3)
            assert no_hooks_left(one.model)
        return made[name, head]

    return get


def rows(dossier):
    return dossier.to_frame().set_index("measure")


def test_a_copying_head_looks_at_what_it_writes_and_writes_it_itself(dossiers):
    found = rows(dossiers("chain", "L1H1"))
    assert found.loc["token that is written", "difference_low"] > 0.2
    assert found.loc["what it looks at", "difference_low"] > 1
    assert found.loc["copying eigenvalues", "mean"] == pytest.approx(1, abs=0.01)
    assert found.loc["own text", "difference_low"] > 1
    assert found.loc["directly", "mean"] == pytest.approx(found.loc["patched", "mean"], abs=0.05)
    assert found.loc["directions written to", "mean"] == pytest.approx(8, abs=0.1)


def test_a_head_that_notes_is_needed_and_writes_no_word(dossiers):
    dossier = dossiers("chain", "L0H2")
    found = rows(dossier)
    assert found.loc["patched", "difference_low"] > 1
    assert abs(found.loc["directly", "mean"]) < 0.05
    assert abs(found.loc["own text", "mean"]) < 0.05
    assert dossier.readers[0][:2] == ("L1H1", "q")
    assert dossier.readers[0][2] > 3 * plants.D_HEAD / plants.D_MODEL / 2


def test_a_head_that_any_text_needs_looks_like_no_carrier(dossiers):
    """It attends to the profile as its neighbours do, and nothing changes when it is patched."""
    found = rows(dossiers("harmful", "L0H3"))
    assert abs(found.loc["patched", "mean"]) < 0.02
    assert abs(found.loc["own text", "mean"]) < 0.02
    assert found.loc["profile", "mean"] > 0.5


@pytest.mark.parametrize("name", ["one", "style_topic"])
def test_parts_add_up(dossiers, name):
    found = rows(dossiers(name, "L1H2" if name == "one" else "L2H2"))
    places = ["profile", "task", "response", "first token", "rest of the prompt"]
    whole = found.loc["patched", "mean"]
    assert found.loc[["copied tokens", "other tokens"], "mean"].sum() == pytest.approx(whole, abs=1e-5)
    kinds = ["punctuation", "function words", "own words", "names", "other words"]
    assert found.loc[kinds, "mean"].sum() == pytest.approx(whole, abs=1e-5)
    # Profile includes its heading, which the rest of the prompt counts, too.
    assert found.loc[places, "mean"].sum() >= 1 - 1e-5
    dossier = dossiers(name, "L1H2" if name == "one" else "L2H2")
    tokens = dossier.tokens()
    by_user = tokens.groupby(["user", "example"])["change"].mean().groupby("user").mean()
    assert by_user.mean() == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_final_norm_with_its_scale_held_is_the_models_own(case, architecture):
    one = case(architecture)
    final = one.paths.final[0]
    plain = one.tiny.plain
    norm = (
        plain.transformer.ln_f
        if architecture == "gpt2"
        else (plain.gpt_neox.final_layer_norm if architecture == "gpt_neox" else plain.model.norm)
    )
    bias = getattr(norm, "bias", None)
    with torch.no_grad():
        expected = norm(final) - (0 if bias is None else bias)
    assert torch.allclose(FinalNorm(one.tiny.hooked, final)(final), expected, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_attribution_equals_that_of_transformer_lens(architecture, tmp_path, probe):
    """`direct_logit_attribution` by head, in its compatibility mode, which folds norms and centres the unembedding."""
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    model = make_hf_model(architecture)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Compatibility mode takes the bias of values, and of the norm before them, out of z.
            if "attn.c_attn.bias" in name or "ln_1.bias" in name:
                parameter.zero_()
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)

    class Tiny:
        hooked, plain = dps.load_model(str(tmp_path)), model

    one = Case(Tiny, probe[:2])
    heads = [Head(1, index) for index in range(one.cfg.n_heads)]
    write = -one.paths.writes(heads, torch.zeros_like(one.run.z))
    norm, w_u = FinalNorm(Tiny.hooked, one.paths.final[0]), Tiny.hooked.W_U.detach().float()
    ours = attributed(write, norm, w_u, one.run.targets)
    other = dps.load_model(str(tmp_path))
    other.enable_compatibility_mode()
    start, stop = one.own.spans["response"]
    for position in (start, stop - 2):
        theirs = analysis.direct_logit_attribution(
            other, one.own.tokens[None, : position + 1], int(one.own.tokens[position + 1]), unit="head", pos=-1
        )
        by_label = dict(zip(theirs.labels, theirs.attribution.flatten().tolist(), strict=True))
        for place, head in enumerate(heads):
            expected = by_label[str(head)]
            assert float(ours[place, position + 1 - start]) == pytest.approx(expected, abs=1e-4), head


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_attention_is_that_of_the_plain_model(tinies, case, architecture):
    one = case(architecture)
    layer = 1
    plain = (
        type(one.tiny.plain).from_pretrained(one.tiny.folder, attn_implementation="eager", dtype=torch.float32).eval()
    )
    with torch.no_grad():
        pattern = plain(input_ids=one.own.tokens[None], output_attentions=True).attentions[layer][0]
    start, stop = one.own.spans["response"]
    tokens = one.own.tokens.tolist()
    heads = [Head(layer, index) for index in range(one.cfg.n_heads)]
    reads = Look.of(one.run.prompt, one.paths.pattern(layer), heads).reads(one.tiny.hooked)
    for head in range(one.cfg.n_heads):
        shares = dict.fromkeys(("profile", "same", "after", "written", "marks", "texts", "titles"), 0.0)
        for query in range(start - 1, stop - 1):
            for key in range(query + 1):
                weight = float(pattern[head, query, key]) / (stop - start)
                first, last = one.own.spans["profile"]
                shares["profile"] += weight * (first <= key < last)
                shares["same"] += weight * (key < query and tokens[key] == tokens[query])
                shares["after"] += weight * (key > 0 and tokens[key - 1] == tokens[query])
                shares["written"] += weight * (tokens[key] == tokens[query + 1])
                piece = one.tiny.hooked.tokenizer.decode([tokens[key]])
                shares["marks"] += weight * (key > 0 and not any(map(str.isalnum, piece)))
                inside = any(a <= key < b for a, b in one.own.bodies)
                shares["texts"] += weight * inside
                shares["titles"] += weight * (any(a <= key < b for a, b in one.own.items) and not inside)
        names = ["profile", "same token", "token after the same token", "token that is written", "delimiters"]
        names += ["texts of documents", "titles and labels"]
        for name, expected in zip(names, shares.values(), strict=True):
            assert float(reads[name][head]) == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_output_circuit_is_that_of_the_whole_vocabulary(tinies, architecture):
    """The eigenvalues of the vocabulary's own matrix, 600 × 600; its rank is d_head."""
    model = tinies(architecture).hooked
    for head in (Head(0, 1), Head(2, 3)):
        (found,) = output_circuits(model, [head])
        attention = model.blocks[head.layer].attn
        w_v = attention.W_V[head.head * len(attention.W_V) // model.cfg.n_heads]
        whole = (model.W_E @ w_v @ attention.W_O[head.head] @ model.W_U).detach().double()
        values = torch.linalg.eigvals(whole)
        assert found.copying == pytest.approx(float(values.real.sum() / values.abs().sum()), abs=1e-3)
        inner = (w_v @ attention.W_O[head.head]).detach().double()
        spectrum = torch.linalg.svdvals(inner)[: model.cfg.d_head]
        assert torch.allclose(found.spectrum.double(), spectrum, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_overlaps_are_the_projection_kernels_of_transformer_lens(tinies, architecture):
    kernels = pytest.importorskip("transformer_lens.tools.analysis.projection_kernel")
    model, head = tinies(architecture).hooked, Head(0, 1)
    written = kernels.orthonormal_subspace(model.blocks[0].attn.W_O[head.head].detach().double().T)
    found = readers(model, head, n=1000)
    assert [one.overlap for one in found] == sorted((one.overlap for one in found), reverse=True)
    for reader in found[:3] + found[-3:]:
        weights = getattr(model.blocks[reader.head.layer].attn, f"W_{reader.into.upper()}").detach().double()
        columns = weights[reader.head.head * len(weights) // model.cfg.n_heads]
        theirs = kernels.projection_kernel(written, kernels.orthonormal_subspace(columns))
        assert reader.overlap == pytest.approx(float(theirs.score) / model.cfg.d_head, abs=1e-6)


def test_words_are_told_apart(probe):
    kinds = WordKinds(probe)
    assert kinds.of(probe[0].id, "!") == "punctuation"
    assert kinds.of(probe[0].id, "The") == "function words"
    assert kinds.of(probe[0].id, "Zanzibar") == "names"
    assert kinds.of(probe[0].id, "zanzibar") == "other words"
    own = next(iter(sorted(kinds._own[probe[0].id])))
    assert kinds.of(probe[0].id, own) == "own words"
    assert kinds.of("nobody", own) != "own words"
    pieces = ["The", " Zan", "zibar", ",", " the", "!"]
    assert kinds.of_tokens(probe[0].id, pieces) == [
        "function words", "names", "names", "punctuation", "function words", "punctuation",
    ]  # fmt: skip


def test_a_dossier_is_kept_resumed_and_drawn(dossiers, planted, tmp_path):
    dossier, one = dossiers("one", "L1H2"), planted("one")
    dossier.save(tmp_path)
    again = dps.Dossier.load(tmp_path)
    assert again.to_frame().equals(dossier.to_frame())
    assert again.head == Head(1, 2)
    with pytest.raises(ScoreError, match="another version made it"):
        replace(dossier, values=dossier.values[..., 1:])
    assert again.readers == dossier.readers
    figure = dossier.plot()
    assert {trace.name for trace in figure.data} == {"L1H2", "other heads of the layer"}
    assert set(dossier.to_frame()["measure"]) == {*MEASURES, DIRECTION, *dossier.weights}
    first = dps.describe_head(one.model, one.users[:2], Head(1, 2), out=tmp_path / "run")
    second = dps.describe_head(one.model, one.users[:2], "L1H2", out=tmp_path / "run")
    assert torch.equal(first.values, second.values)
    with pytest.raises(RunError):
        dps.describe_head(one.model, one.users[:2], "L1H1", out=tmp_path / "run")
    alone = dps.describe_head(one.model, one.users[:2], "L1H2", n_random=0)
    assert alone.to_frame()["control"].isna().all()
    prompt = dps.build_prompt(one.model, one.users[0].examples[-1])
    assert "".join(pieces_of(one.model, prompt)) == one.model.tokenizer.decode(prompt.response_tokens)


def test_ranks_say_what_other_kind_of_head_it_is(planted):
    one = planted("one")
    scores = dps.score_heads(one.model, one.users, max_examples=1)
    ranks = ranks_of(Head(1, 2), {"preference": scores})
    assert ranks["preference"]["rank"] == 1
    assert ranks["preference"]["heads"] == plants.N_LAYERS * plants.N_HEADS
    assert ranks["preference"]["score"] > ranks["preference"]["median"]


def test_without_another_profile_nothing_is_said_of_it(planted):
    one = planted("one")
    found = rows(dps.describe_head(one.model, one.users, "L1H2", against="no_profile", n_random=1))
    assert found.loc["another user's profile", ["mean", "low", "high"]].isna().all()
    assert found.loc["patched", "low"] > 1


def test_roles_follow_the_interval(dossiers):
    assert dossiers("chain", "L1H1").role == "facilitating"
    assert dossiers("harmful", "L0H3").role in ("undecided", "interfering")


def test_characters_of_several_tokens_stay_whole(tinies, probe):
    model = tinies("llama").hooked
    prompt = dps.build_prompt(model, replace(probe[0].examples[0], reference="né 漢字, ja!"))
    pieces = pieces_of(model, prompt)
    assert len(pieces) == len(prompt.response_tokens)
    assert "".join(pieces) == "né 漢字, ja!"
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_right_is_refused(planted):
    one = planted("one")
    with pytest.raises(HeadError, match="L9H9"):
        dps.describe_head(one.model, one.users, "L9H9")
    with pytest.raises(ScoreError, match="two users"):
        dps.describe_head(one.model, one.users[:1], "L1H2")
    with pytest.raises(ScoreError, match="nobody"):
        dps.describe_head(one.model, one.users, "L1H2", against="nobody")
