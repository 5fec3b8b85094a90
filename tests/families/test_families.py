"""Reference families: against slow oracles on random models, and on circuits whose heads are known."""

import copy
import json
import math
import random
from types import SimpleNamespace

import circuits
import pytest
import torch
import transformers
from conftest import make_hf_model, make_tokenizer, no_hooks_left
from oracles import two_pass_greedy
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from transformer_lens.head_detector import detect_head

import dps_lens as dps
from dps_lens.errors import ScoreError
from dps_lens.families import (
    KINDS,
    FunctionVector,
    Needle,
    Repeated,
    Retrieval,
    Task,
    reference,
    reference_heads,
    shipped_paragraphs,
)
from dps_lens.families import retrieval as retrieval_module
from dps_lens.families.function_vector import shipped_tasks
from dps_lens.families.repeated import attention_to, repeated_tokens
from dps_lens.families.retrieval import MIN_RECALLED, needle_prompt, shipped_needles
from dps_lens.heads import Head, HeadSet

TOLERANCE = 1e-5  # attention and probabilities, float32
TEXTS = [
    "the cat saw the dog and the dog saw the cat",
    "One fish, two fish, red fish, blue fish: this one has a little star, this one has a little car.",
    "no no no no word again no word again",
]
LANGUAGES = tuple(circuits.language(name) for name in circuits.LANGUAGES)


@pytest.fixture(scope="module")
def copying(tmp_path_factory):
    return dps.load_model(str(circuits.copying(tmp_path_factory.mktemp("copying"))))


@pytest.fixture(scope="module")
def translating(tmp_path_factory):
    return dps.load_model(str(circuits.translating(tmp_path_factory.mktemp("translating"))))


def marked(kind, tokens):
    """Pairs of query and key that count, by definition."""
    n = len(tokens)
    if kind == "previous_token":
        return [(query, query - 1) for query in range(1, n)]
    same = [(query, key) for query in range(n) for key in range(query) if tokens[query] == tokens[key]]
    return same if kind == "duplicate_token" else [(query, key + 1) for query, key in same]


def others(mean, *heads):
    """The scores of all heads but these."""
    return [float(mean[layer, head]) for layer, head in mean.isfinite().nonzero() if (layer, head) not in heads]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", Repeated.kinds)
def test_attention_agrees_with_transformer_lens(tinies, architecture, kind):
    model = tinies(architecture).hooked
    for text in TEXTS:
        tokens = model.to_tokens(text)
        pairs = marked(kind, tokens[0].tolist())
        target = torch.zeros(tokens.shape[1], tokens.shape[1])
        for query, key in pairs:
            target[query, key] = 1
        # `mul` divides by all attention, one unit a token; ours by the tokens that have a marked place.
        expected = detect_head(model, text, f"{kind}_head", error_measure="mul")
        expected = expected * tokens.shape[1] / len({query for query, _ in pairs})
        assert torch.allclose(attention_to(model, tokens, target), expected, atol=TOLERANCE)
        assert expected.max() > 1000 * TOLERANCE
    assert no_hooks_left(model)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_repeated_scores_are_the_attention_of_plain_hugging_face(tinies, architecture):
    tiny, length = tinies(architecture), 12
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder, attn_implementation="eager").eval()
    for kind in Repeated.kinds:
        scores = Repeated(kind, n_prompts=2, length=length, seed=5).score(tiny.hooked)
        assert scores.example_ids == ("seed 5", "seed 6")
        for row, seed in enumerate((5, 6)):
            tokens = repeated_tokens(tiny.hooked, length, seed)
            with torch.no_grad():
                attention = torch.stack(plain(tokens, output_attentions=True).attentions)[:, 0]
            expected = {
                "induction": [(1 + length + index, 2 + index) for index in range(length)],
                "duplicate_token": [(1 + length + index, 1 + index) for index in range(length)],
                "previous_token": [(1 + index, index) for index in range(2 * length)],
            }[kind]
            mean = sum(attention[:, :, query, key] for query, key in expected) / len(expected)
            assert torch.allclose(scores.values[row], mean, atol=TOLERANCE)


def test_text_without_a_repetition_has_no_induction_score(llama):
    with pytest.raises(ScoreError, match="marks no key"):
        attention_to(llama.hooked, torch.tensor([[1, 20, 21, 22]]), torch.zeros(4, 4))


def test_repeated_prompt_holds_distinct_ordinary_tokens(llama):
    tokenizer = copy.deepcopy(llama.hooked.tokenizer)
    special = set(tokenizer.all_special_ids)
    tokenizer.add_tokens([AddedToken("<|reserved_0|>", special=True), AddedToken("ordinary_0", special=False)])
    reserved, ordinary = tokenizer.convert_tokens_to_ids(["<|reserved_0|>", "ordinary_0"])
    assert reserved not in tokenizer.all_special_ids
    model = SimpleNamespace(tokenizer=tokenizer)

    tokens = repeated_tokens(model, 50, 3)
    first, second = tokens[0, 1:51], tokens[0, 51:]
    assert tokens.shape == (1, 101)
    assert int(tokens[0, 0]) == tokenizer.bos_token_id
    assert torch.equal(first, second)
    assert len(set(first.tolist())) == 50
    assert torch.equal(tokens, repeated_tokens(model, 50, 3))
    assert not torch.equal(tokens, repeated_tokens(model, 50, 4))

    usable = set(range(len(tokenizer))) - special - {reserved}
    assert ordinary in usable
    assert set(repeated_tokens(model, len(usable), 0)[0, 1:].tolist()) == usable
    with pytest.raises(ScoreError, match="distinct tokens asked for"):
        repeated_tokens(model, len(usable) + 1, 0)
    tokenizer.bos_token = None
    assert torch.equal(repeated_tokens(model, 50, 3)[0, :50], repeated_tokens(model, 50, 3)[0, 50:])


def test_repeated_prompt_must_fit_the_context(copying):
    with pytest.raises(ScoreError, match="129 tokens do not fit the context of 128"):
        Repeated("induction", length=64).score(copying)


@pytest.mark.parametrize(
    ("kind", "head", "at_least"),
    [
        ("induction", circuits.INDUCTION, 0.9),
        ("previous_token", circuits.PREVIOUS, 0.9),
        ("duplicate_token", circuits.DUPLICATE, 0.45),  # the other half of its attention stays where it is
    ],
)
def test_circuit_is_found(copying, kind, head, at_least):
    scores = Repeated(kind).score(copying)
    mean = scores.mean()
    assert scores.values.shape == (20, 2, 4)
    assert scores.top(1).heads == (Head(*head),)
    assert float(mean[head]) > at_least
    assert max(others(mean, head)) < 0.2


def retrieval(**settings):
    defaults = {"lengths": (64, 96), "depths": (0.1, 0.5, 0.9), "needles": circuits.NEEDLES}
    return Retrieval(**{**defaults, "haystack": circuits.haystack(), **settings})


def test_head_that_copies_the_needle_scores_one(copying):
    scores = retrieval().score(copying, progress=False)
    mean = scores.mean()
    assert scores.manifest["recalled"] == {"64": "9 of 9", "96": "9 of 9"}
    assert scores.defined
    assert len(scores.values) == len(set(scores.example_ids)) == 18
    assert float(mean[circuits.INDUCTION]) == pytest.approx(1.0, abs=1e-6)
    # Among them a head that looks at the needle, at the word before the one that is generated.
    assert max(others(mean, circuits.INDUCTION)) < 0.05
    assert no_hooks_left(copying)


def test_score_is_the_share_of_the_answer_that_is_copied(tmp_path):
    model = dps.load_model(str(circuits.copying(tmp_path, partial=True)))
    scores = retrieval().score(model, progress=False)
    shares = {f"needle {n}": 1 / len(needle.answer.split()) for n, needle in enumerate(circuits.NEEDLES)}
    for row, name in enumerate(scores.example_ids):
        assert float(scores.values[row][circuits.PARTIAL]) == pytest.approx(shares[name.split(",")[0]], abs=1e-6)
        assert float(scores.values[row][circuits.INDUCTION]) == pytest.approx(1.0, abs=1e-6)


def test_prompt_as_long_as_the_context_leaves_room_for_the_answer(copying):
    scores = retrieval(lengths=(128, 129), depths=(0.0, 0.2, 0.5, 0.7, 0.9)).score(copying, progress=False)
    assert scores.manifest["recalled"] == {"128": "15 of 15"}
    assert float(scores.mean()[circuits.INDUCTION]) == pytest.approx(1.0, abs=1e-6)


def test_too_few_recalled_needles_give_no_scores(copying):
    scores = retrieval(lengths=(64,)).score(copying, progress=False)
    assert MIN_RECALLED == 10
    assert not scores.defined
    assert scores.values.isnan().all()
    assert scores.manifest["reason"] == "9 needles were recalled ({'64': '9 of 9'}); 10 are needed"


def test_model_that_recalls_nothing_gives_no_scores(llama, tmp_path):
    family = Retrieval(lengths=(300, 200), depths=(0.1, 0.9), needles=shipped_needles()[:1])
    for _ in range(2):  # computed, then read
        scores = reference_heads(llama.hooked, (family,), cache=tmp_path)["retrieval"]
        assert scores.manifest["recalled"] == {"200": "0 of 2"}, "the longer prompts need not be tried"
        assert scores.values.shape == (1, 3, 4)
        assert scores.values.isnan().all()
        assert not scores.defined
        with pytest.raises(ScoreError, match=r"top: retrieval are not defined: 0 needles were recalled \(\{'200'"):
            scores.top(1)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_needle_is_asked_for_by_greedy_decoding(tinies, architecture, monkeypatch):
    tiny, needles, texts = tinies(architecture), shipped_needles()[:3], []
    model, tokenizer = tiny.hooked, tiny.hooked.tokenizer
    monkeypatch.setattr(retrieval_module, "_recall", lambda answer, text: texts.append(text) or 0.0)
    Retrieval(lengths=(200,), depths=(0.3,), needles=needles).score(model, progress=False)

    @torch.no_grad()
    def logits(tokens):
        return tiny.plain(input_ids=tokens[None]).logits[0, -1]

    ends, seen = {tokenizer.eos_token_id}, set()
    for needle, text in zip(needles, texts, strict=True):
        ids, (start, stop) = needle_prompt(model, shipped_paragraphs(), needle, 200, 0.3)
        expected, gap = two_pass_greedy(logits, None, torch.tensor(ids), 0.0, stop - start + 4, ends)
        assert gap > 1e-4, "the reference itself is undecided here; use another needle"
        assert text.startswith(tokenizer.decode(expected, skip_special_tokens=True))
        seen |= set(expected)
    assert len(seen) > 3


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["byte", "metaspace"])
def test_needle_prompt_holds_the_needle_at_its_depth(kind, chat):
    tokenizer = make_tokenizer(kind, chat=chat)
    model = SimpleNamespace(tokenizer=tokenizer)
    for needle in shipped_needles()[:2]:
        for length in (256, 700):
            places = []
            for depth in (0.1, 0.3, 0.5, 0.7, 0.9):
                ids, (start, stop) = needle_prompt(model, shipped_paragraphs(), needle, length, depth)
                places.append(start)
                text = tokenizer.decode(ids)
                # A metaspace BPE may merge the last letters with the full stop.
                assert tokenizer.decode(ids[start:stop]).strip().rstrip(".") == needle.answer
                assert text.count(needle.sentence) == 1
                before, after = text.split(needle.sentence)
                sentences = before.count("."), after[: after.index(needle.question)].count(".")
                assert abs(sentences[0] - depth * sum(sentences)) <= 0.5
                assert text.endswith(needle.stem)
                assert length - 120 < len(ids) <= length, "another sentence would have fitted"
            assert places == sorted(places)
            assert places[0] < places[-1]


def test_needle_prompt_needs_room_and_text(llama):
    needle = shipped_needles()[0]
    with pytest.raises(ScoreError, match="60 tokens leave no room"):
        needle_prompt(llama.hooked, shipped_paragraphs(), needle, 60, 0.5)
    with pytest.raises(ScoreError, match="the haystack is shorter than 1000 tokens"):
        needle_prompt(llama.hooked, shipped_paragraphs()[:1], needle, 1000, 0.5)


def test_head_that_carries_the_task_is_found(translating):
    family = FunctionVector(tasks=LANGUAGES, n_shots=4, n_trials=8)
    scores = family.score(translating, progress=False)
    mean = scores.mean()
    assert scores.values.shape == (24, 2, 4)
    assert scores.users == circuits.LANGUAGES
    assert scores.top(1).heads == (Head(*circuits.TASK),)
    # Without the vector three languages share the probability; with it the right one takes it.
    assert float(mean[circuits.TASK]) == pytest.approx(2 / 3, abs=0.02)
    assert float(mean[circuits.WORD]) < -0.2, "a mean over questions takes the question away"
    assert max(abs(value) for value in others(mean, circuits.TASK, circuits.WORD)) < 0.01
    assert scores.manifest["left_out"] == []
    assert all(found == {"accuracy": 1.0, "chance": 1 / 12} for found in scores.manifest["in_context"].values())
    assert no_hooks_left(translating)


def test_tasks_that_are_not_learnt_are_left_out_and_named(translating):
    (red, *_), words = LANGUAGES, circuits.INPUTS
    wrong = Task("next red", tuple((word, f"red{(index + 1) % 12}") for index, word in enumerate(words)))
    mostly = Task("mostly red0", (*((word, "red0") for word in words[:9]), *red.pairs[9:]))
    family = FunctionVector(tasks=(wrong, red, mostly), n_shots=4, n_trials=4)
    scores = family.score(translating, progress=False)
    assert scores.defined
    assert scores.users == ("red",)
    assert scores.manifest["left_out"] == ["next red", "mostly red0"]
    assert scores.manifest["in_context"]["next red"]["accuracy"] == 0
    assert scores.manifest["in_context"]["mostly red0"]["chance"] == 9 / 12
    alone = FunctionVector(tasks=(red,), n_shots=4, n_trials=4).score(translating, progress=False)
    assert torch.equal(alone.values, scores.values)


def test_accuracy_at_chance_gives_no_scores(llama):
    family = FunctionVector(tasks=shipped_tasks()[:2], n_shots=2, n_trials=2)
    scores = family.score(llama.hooked, progress=False)
    assert scores.values.shape == (1, 3, 4)
    assert scores.values.isnan().all()
    assert scores.manifest["reason"] == "in-context accuracy is at chance in every task (antonym, plural)"
    with pytest.raises(ScoreError, match="at chance in every task"):
        scores.top(1)


def test_task_counts_above_two_standard_errors_of_chance(translating, monkeypatch):
    family = FunctionVector(tasks=LANGUAGES[:1], n_shots=4, n_trials=16)
    limit = 16 * (1 / 12 + 2 * math.sqrt(1 / 12 * 11 / 12 / 16))
    mean, _ = family.task_mean(translating, LANGUAGES[0])
    for correct in (math.floor(limit), math.floor(limit) + 1):
        monkeypatch.setattr(FunctionVector, "task_mean", lambda *_, found=(mean, correct): found)
        assert family.score(translating, progress=False).defined == (correct > limit)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_function_vector_equals_plain_hooks(tinies, architecture):
    tiny = tinies(architecture)
    model, cfg, task = tiny.hooked, tiny.hooked.cfg, shipped_tasks()[3]
    family = FunctionVector(tasks=(task,), n_shots=3, n_trials=3)

    def run(tokens, layer, edit):
        hooks = [(f"blocks.{layer}.attn.hook_z", lambda z, hook: edit(z))]
        with torch.no_grad():
            return model.run_with_hooks(tokens[None], fwd_hooks=hooks, return_type="logits")[0, -1]

    mean, correct = family.task_mean(model, task)
    expected, right = torch.zeros(cfg.n_layers, cfg.n_heads, cfg.d_head), 0
    for index in range(family.n_trials):
        prompt = family.prompt(model, task, index)
        for layer in range(cfg.n_layers):
            found = []
            logits = run(prompt.prompt_tokens, layer, lambda z, found=found: found.append(z[0, -1].clone()))
            expected[layer] += found[0] / family.n_trials
        right += int(logits.argmax()) == int(prompt.response_tokens[0])
    assert torch.allclose(mean, expected, atol=TOLERANCE)
    assert correct == right

    # Random models give right answers next to no probability: ask for what they do answer, too.
    largest = 0.0
    for index in range(family.n_trials):
        prompt = family.prompt(model, task, index, shuffled=True)
        likely = int(run(prompt.prompt_tokens, 0, lambda z: z).argmax())
        for target in (int(prompt.response_tokens[0]), likely):
            prompt.tokens[-1] = target
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FunctionVector, "prompt", lambda *_, found=prompt, **__: found)
                got = family.effect(model, task, index, mean)
            before = float(run(prompt.prompt_tokens, 0, lambda z: z).softmax(-1)[target])
            for layer in range(cfg.n_layers):
                for head in range(cfg.n_heads):

                    def patched(z, layer=layer, head=head):
                        z = z.clone()
                        z[:, -1, head] = mean[layer, head]
                        return z

                    after = float(run(prompt.prompt_tokens, layer, patched).softmax(-1)[target])
                    assert float(got[layer, head]) == pytest.approx(after - before, abs=TOLERANCE)
                    largest = max(largest, abs(after - before))
    assert largest > 100 * TOLERANCE, "the mean changes nothing; the comparison shows nothing"


def examples_in(prompt):
    """`(input, output)` of the shots, and the question, read back from the text."""
    *shots, question = prompt.text.split("\n\n")
    pairs = [tuple(part[3:] for part in shot.split("\n")) for shot in shots]
    return pairs, question.removeprefix("Q: ").removesuffix("\nA:")


def test_shuffled_prompts_displace_every_output(llama):
    task = shipped_tasks()[0]
    family, right, seen = FunctionVector(n_shots=6), dict(task.pairs), set()
    for index in range(20):
        plain = family.prompt(llama.hooked, task, index)
        pairs, question = examples_in(plain)
        assert len(set(pairs)) == 6
        assert set(pairs) <= set(task.pairs)
        assert question not in dict(pairs)
        shuffled = family.prompt(llama.hooked, task, index, shuffled=True)
        displaced, asked = examples_in(shuffled)
        assert all(right[shown] != output for shown, output in displaced)
        assert sorted(right[shown] for shown, _ in displaced) == sorted(output for _, output in displaced)
        assert asked not in dict(displaced)
        assert torch.equal(shuffled.tokens, family.prompt(llama.hooked, task, index, shuffled=True).tokens)
        seen |= {plain.text, shuffled.text}
    assert len(seen) == 40
    other = FunctionVector(n_shots=6, seed=1).prompt(llama.hooked, task, 0)
    assert other.text not in seen


def prefixing_tokenizer():
    """A BPE that puts a space before every text, also before one that begins with a space, as Llama 2 has it."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Metaspace()
    outputs = [output for task in shipped_tasks() for _, output in task.pairs]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    inner.train_from_iterator([*outputs, "Q:", "A:", "\n"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("kind", ["byte", "metaspace", "prefixing"])
def test_the_first_token_of_an_answer_is_what_follows_in_the_text(kind):
    tokenizer = prefixing_tokenizer() if kind == "prefixing" else make_tokenizer(kind)
    model, task = SimpleNamespace(tokenizer=tokenizer), shipped_tasks()[3]
    family, answers = FunctionVector(tasks=(task,), n_shots=3), dict(task.pairs)
    first = set()
    for index in range(10):
        prompt = family.prompt(model, task, index)
        whole = tokenizer(f"{prompt.text} {answers[examples_in(prompt)[1]]}", add_special_tokens=False)["input_ids"]
        whole = [tokenizer.bos_token_id, *whole]
        n = len(prompt.prompt_tokens)
        assert whole[:n] == prompt.prompt_tokens.tolist()
        assert prompt.response_tokens.tolist() == whole[n : n + 1]
        first.add(whole[n])
    assert len(first) > 3


@pytest.mark.parametrize("n_shots", [4, 5])
def test_too_few_pairs_are_refused(translating, n_shots):
    task = Task("short", LANGUAGES[0].pairs[:5])
    family = FunctionVector(tasks=(task,), n_shots=n_shots, n_trials=2)
    if n_shots == 4:
        assert family.score(translating, progress=False).defined
    else:
        with pytest.raises(ScoreError, match="task 'short' has 5 pairs, 6 are needed"):
            family.score(translating, progress=False)


def test_a_single_shot_cannot_be_shuffled(translating):
    with pytest.raises(ScoreError, match="n_shots is 1"):
        FunctionVector(tasks=LANGUAGES, n_shots=1, n_trials=2).score(translating, progress=False)


def test_unknown_kind_names_the_kinds(llama):
    with pytest.raises(ScoreError, match=f"'nonsense' is unknown; use one of {', '.join(KINDS)}"):
        reference_heads(llama.hooked, ("nonsense",), cache=False)
    assert KINDS == (
        "induction",
        "previous_token",
        "duplicate_token",
        "copying",
        "copy_suppression",
        "retrieval",
        "function_vector",
    )


def test_a_family_is_scored_once_in_a_call(llama):
    kinds = (Repeated("induction", n_prompts=1, length=8), Repeated("induction", n_prompts=2, length=8))
    with pytest.raises(ScoreError, match="two families are called 'induction'"):
        reference_heads(llama.hooked, kinds, cache=False)


def test_families_of_a_known_model(copying, translating, tmp_path):
    found = reference_heads(copying, ("induction", "previous_token", retrieval()), cache=tmp_path)
    assert list(found) == ["induction", "previous_token", "retrieval"]
    assert found["induction"].top(1).heads == found["retrieval"].top(1).heads == (Head(*circuits.INDUCTION),)
    assert found["induction"].top(1).label == "induction"
    assert found["retrieval"].manifest["settings"]["lengths"] == [64, 96]
    family = FunctionVector(tasks=LANGUAGES, n_shots=4, n_trials=4)
    scores = reference_heads(translating, (family,), cache=tmp_path)["function_vector"]
    assert scores.top(1).heads == (Head(*circuits.TASK),)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.fixture
def computed(monkeypatch):
    """Counts how often scores are computed."""
    calls, score = [], Repeated.score

    def counted(self, model, **options):
        calls.append(self)
        return score(self, model, **options)

    monkeypatch.setattr(Repeated, "score", counted)
    return calls


def test_scores_are_kept_and_read_again(llama, tmp_path, monkeypatch):
    first = reference_heads(llama.hooked, ("induction",), cache=tmp_path)["induction"]
    assert len(list(tmp_path.iterdir())) == 1

    def fail(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(Repeated, "score", fail)
    second = reference_heads(llama.hooked, ("induction",), cache=str(tmp_path))["induction"]
    assert torch.equal(first.values, second.values)
    assert (first.example_ids, first.user_ids) == (second.example_ids, second.user_ids)
    made = {"made": second.manifest["made"]}
    assert first.manifest | made == second.manifest


def test_other_models_and_settings_are_computed(llama, computed, tmp_path):
    same_name = tmp_path / "other" / llama.folder.rsplit("/", 1)[-1]
    make_hf_model("llama", seed=1).save_pretrained(same_name)
    llama.hooked.tokenizer.save_pretrained(same_name)
    other = dps.load_model(str(same_name))
    cache, small = tmp_path / "cache", {"n_prompts": 2, "length": 8}
    base = Repeated("induction", **small)
    variants = [
        base,
        Repeated("duplicate_token", **small),
        Repeated("induction", n_prompts=3, length=8),
        Repeated("induction", n_prompts=2, length=9),
        Repeated("induction", **small, seed=1),
    ]
    for n, (model, family) in enumerate([*((llama.hooked, variant) for variant in variants), (other, base)], start=1):
        reference_heads(model, (family,), cache=cache)
        assert (len(computed), len(list(cache.iterdir()))) == (n, n)
    reference_heads(llama.hooked, variants[:1], cache=cache)
    assert len(computed) == n


def test_other_settings_of_the_long_families_are_told_apart():
    needle = Needle("It is so.", "Is it?", "so")
    families = [
        FunctionVector(),
        FunctionVector(tasks=LANGUAGES),
        FunctionVector(n_shots=9),
        FunctionVector(n_trials=9),
        FunctionVector(seed=9),
        Retrieval(),
        Retrieval(lengths=(99,)),
        Retrieval(depths=(0.99,)),
        Retrieval(needles=(needle,)),
        Retrieval(haystack=("Hay.",)),
    ]
    assert len({json.dumps([family.name, family.settings()]) for family in families}) == len(families)


@pytest.mark.parametrize("harm", ["torn tensors", "torn manifest", "no manifest", "no tensors", "foreign"])
def test_harmed_files_are_computed_again(llama, computed, tmp_path, harm):
    family = Repeated("induction", n_prompts=2, length=8)
    first = reference_heads(llama.hooked, (family,), cache=tmp_path)["induction"]
    (folder,) = tmp_path.iterdir()
    tensors, manifest = folder / "scores.safetensors", folder / "scores.json"
    if harm.startswith("torn"):
        path = tensors if harm == "torn tensors" else manifest
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif harm.startswith("no"):
        (tensors if harm == "no tensors" else manifest).unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"length": 8', '"length": 9'))
    for _ in range(2):
        again = reference_heads(llama.hooked, (family,), cache=tmp_path)["induction"]
        assert torch.equal(again.values, first.values)
        assert len(computed) == 2
    assert list(tmp_path.iterdir()) == [folder]


def test_where_scores_are_kept(llama, computed, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.chdir(tmp_path)
    family = Repeated("induction", n_prompts=2, length=8)
    for _ in range(2):
        reference_heads(llama.hooked, (family,), cache=False)
    assert len(computed) == 2
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        reference_heads(llama.hooked, (family,))
    assert len(computed) == 3
    assert len(list((tmp_path / "dps_lens" / "families").iterdir())) == 1


def test_scores_of_an_ablated_model_are_not_kept(copying, tmp_path):
    whole = reference_heads(copying, ("induction",), cache=tmp_path)["induction"].mean()
    with dps.ablate(copying, HeadSet([circuits.PREVIOUS]), positions="all"):
        without = reference_heads(copying, ("induction",), cache=tmp_path)["induction"].mean()
    after = reference_heads(copying, ("induction",), cache=tmp_path)["induction"].mean()
    assert float(whole[circuits.INDUCTION]) > 0.9
    assert float(without[circuits.INDUCTION]) < 0.2, "the circuit needs its first head"
    assert torch.equal(after, whole)


def test_shipped_tasks():
    tasks = shipped_tasks()
    assert len({task.name for task in tasks}) == len(tasks) == 10
    for task in tasks:
        assert len(task.pairs) == 40, task.name
        assert len({shown for shown, _ in task.pairs}) == 40, task.name
        assert all(text == text.strip() and text for pair in task.pairs for text in pair), task.name


def test_shipped_needles_and_haystack():
    needles, paragraphs = shipped_needles(), shipped_paragraphs()
    assert len({needle.answer for needle in needles}) == len(needles) >= 4
    text = " ".join(paragraphs).lower()
    for needle in needles:
        assert needle.sentence == f"{needle.stem} {needle.answer}."
        assert needle.question.endswith("?")
        assert needle.answer.lower() not in text
        assert needle.stem.lower() not in text
        assert needle.answer.lower() not in needle.question.lower()
    for paragraph in paragraphs:
        assert paragraph.endswith(".")
        assert not {"?", "!", "\n"} & set(paragraph), "sentences are cut at full stops"
    # Long enough for the longest prompts by the sparsest of tokenizers, of a token a word.
    assert len(text.split()) > max(Retrieval().lengths)


def test_displacing_leaves_nothing_in_place():
    from dps_lens.families.function_vector import _displaced

    rng = random.Random(0)
    for size in (2, 3, 10):
        outputs = [str(index) for index in range(size)]
        for _ in range(50):
            order = _displaced(outputs, rng)
            assert sorted(order) == outputs
            assert all(old != new for old, new in zip(outputs, order, strict=True))
