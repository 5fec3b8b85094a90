"""Rules of contrastive decoding against naive decoding: whole passes of the plain model, no cache, no hooks of ours."""

import math
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
import transformers
from conftest import ARCHITECTURES, no_hooks_left
from flat import generate
from oracles import columns_replaced, uniform_z

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import HeadError, PromptError, SteeringError
from dps_lens.heads import Head, HeadSet
from dps_lens.intervene import Scale, window
from dps_lens.model import runs_native
from dps_lens.model.runners import runner_of
from dps_lens.steering import mixing, terms
from dps_lens.steering.layout import layers_to_contrast
from dps_lens.steering.sampling import Chooser

GAP = 1e-4  # nearer than this, rounding may decide; none may occur here
SETS = [HeadSet.parse(names) for names in ("L0H1,L2H3", "L1H0", "L0H2,L1H1,L2H0", "L1H3,L2H1")]
GAMMAS, ALPHAS = [0.7, 0.0, 1.6, -1.0], [0.5, 1.5, 0.0, 1.0]
CONTRASTS = [
    "dps", "dps-entropy", "dps-js", "decore", "cad", "cos", "adacad", "dola", "amplify", "dps+cad", "amplify+cad"
]  # fmt: skip

QUICK = ("dps", "decore", "dola")  # what the small models do not cover is the size; a few rules show it


class Naive:
    """One request by definition. Calling it with the new tokens gives full (or None) and steered logits, float64."""

    def __init__(self, tiny, rule, prompt, *, negative_prompts=None, heads=(), gamma=0.0, alpha=0.0, **options):
        self.plain, self.d_head, self.n_heads = tiny.plain, tiny.hooked.cfg.d_head, tiny.hooked.cfg.n_heads
        self.rule, self.gamma, self.alpha = rule, gamma, alpha
        self.weights = dict(heads) if isinstance(heads, dict) else dict.fromkeys(heads, 1.0)
        self.prompt, self.without = prompt, negative_prompts
        self.max_gamma, self.layers = options.get("max_gamma", math.inf), options.get("layers", (1,))
        start = prompt.spans["response"][0]
        places = {"response": slice(start - 1, None), "all": slice(None), "profile": slice(*prompt.spans["profile"])}
        self.edited = places[options.get("positions", "response")]
        self.measured = []  # entropies, or divergences of early layers

    @torch.no_grad()
    def logits(self, prompt, new):
        return self.plain(input_ids=torch.cat([prompt.prompt_tokens, new])[None]).logits[0, -1].double().numpy()

    def scaled(self, new, change):
        """The model whose heads' z is multiplied by 1 + weight · change."""

        def edit(head, weight):
            columns = slice(head * self.d_head, (head + 1) * self.d_head)
            return lambda z: z[..., columns] * (1 + weight * change)

        with ExitStack() as stack:
            for (layer, head), weight in self.weights.items():
                new_z = edit(head, weight)
                stack.enter_context(columns_replaced(self.plain, layer, head, self.d_head, self.edited, new_z))
            return self.logits(self.prompt, new)

    def uniform(self, new):
        with ExitStack() as stack:
            for layer, head in self.weights:
                new_z, handle = uniform_z(self.plain, layer, head, self.d_head, self.n_heads)
                stack.callback(handle.remove)
                stack.enter_context(columns_replaced(self.plain, layer, head, self.d_head, self.edited, new_z))
            return self.logits(self.prompt, new)

    @torch.no_grad()
    def dola(self, new):
        out = self.plain(
            input_ids=torch.cat([self.prompt.prompt_tokens, new])[None], output_hidden_states=True, use_cache=False
        )
        cap = getattr(self.plain.config, "final_logit_softcapping", None)
        p, best = softmax(out.logits[0, -1].double().numpy()), (-1.0, None)
        for layer in self.layers:
            early = self.plain.get_output_embeddings()(final_norm(self.plain)(out.hidden_states[layer]))[0, -1]
            q = softmax((early if cap is None else cap * torch.tanh(early / cap)).double().numpy())
            jsd = js(p, q)
            self.measured.append(jsd)
            best = max(best, (jsd, layer, q), key=lambda found: found[0])
        return np.where(p < 0.1 * p.max(), -np.inf, np.log(p) - np.log(best[2]))

    def strength(self, full):
        """γ of this step."""
        if self.gamma and self.rule in ("dps-entropy", "decore"):
            self.measured.append(scipy.stats.entropy(softmax(full)))
            return min(self.measured[-1], self.max_gamma)
        return self.gamma

    def __call__(self, new):
        full, gamma, alpha = self.logits(self.prompt, new), self.gamma, self.alpha
        without = self.logits(self.without, new) if alpha else full
        if self.rule == "dola":
            steered = self.dola(new)
        elif self.rule == "cad":
            steered = (1 + alpha) * full - alpha * without
        elif self.rule == "adacad":
            alpha = js(softmax(full), softmax(without)) if alpha else 0.0
            steered = (1 + alpha) * full - alpha * without
        elif self.rule == "cos":
            steered = (1 + alpha) * log_softmax(full) - alpha * log_softmax(without)
        elif self.rule in ("amplify", "amplify+cad"):
            amplified = self.scaled(new, gamma)
            steered = (1 + alpha) * amplified - alpha * without if alpha else amplified
        else:
            gamma = self.strength(full)
            masked = self.uniform(new) if self.rule == "decore" else self.scaled(new, -1)
            if self.rule == "dps-js":
                gamma = js(softmax(full), softmax(masked)) if gamma else 0.0
            steered = (1 + gamma) * full - gamma * masked
            if self.rule == "dps+cad":
                steered = full + gamma * (full - masked) + alpha * (full - without)
        alone = gamma if self.rule.startswith("amplify") else self.rule == "dps" and gamma == -1
        return None if alone else full, steered


def softmax(logits):
    return scipy.special.softmax(logits)


def log_softmax(logits):
    return scipy.special.log_softmax(logits)


def js(p, q):
    middle = (p + q) / 2
    return (scipy.stats.entropy(p, middle) + scipy.stats.entropy(q, middle)) / 2


def kl(steered, full):
    return float(scipy.stats.entropy(softmax(steered), softmax(full)))


def final_norm(plain):
    named = dict(plain.named_modules())
    return next(
        named[name] for name in ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm") if name in named
    )


def largest(steered):
    second, first = np.sort(steered)[-2:]
    assert first - second > GAP, "the reference itself is undecided here; use another prompt"
    return int(steered.argmax())


def draw(steered, uniform, temperature, top_k=None, top_p=None):
    """Invert the cumulative distribution of one row, in the order of the token ids."""
    scaled = steered / temperature
    if top_k is not None:
        ordered = np.sort(scaled)[::-1]
        # Where a rule leaves fewer tokens, all of them may be drawn.
        assert ordered[top_k] == -np.inf or ordered[top_k - 1] - ordered[top_k] > GAP
        scaled = np.where(scaled < ordered[top_k - 1], -np.inf, scaled)
    p = softmax(scaled)
    if top_p is not None:
        kept, mass = [], 0.0
        for token in np.argsort(-p, kind="stable"):
            assert abs(mass - top_p) > GAP
            if mass >= top_p:
                break
            kept.append(token)
            mass += p[token]
        p = np.where(np.isin(np.arange(len(p)), kept), p, 0) / mass
    edges = np.cumsum(p)
    assert np.abs(edges[p > 0][:-1] - uniform).min(initial=1) > GAP, "the reference itself is undecided here"
    return int((edges <= uniform * edges[-1]).sum())


def check(naive, out, row, choose=largest):
    """Every token of a row is what the naive reference chooses after those before it, and so are the measures.

    By induction the sequence is the reference's own.
    """
    for step, token in enumerate(out.tokens[row].tolist()):
        full, steered = naive(out.tokens[row][:step])
        assert choose(steered) == token, (row, step)
        logprob = log_softmax(steered)[token]
        assert float(out.logprobs[row][step]) == pytest.approx(logprob, abs=1e-3)
        if full is None:
            assert math.isnan(out.shifts[row][step])
            assert math.isnan(out.kl[row][step])
        else:
            assert float(out.shifts[row][step]) == pytest.approx(logprob - log_softmax(full)[token], abs=1e-3)
            assert float(out.kl[row][step]) == pytest.approx(kl(steered, full), abs=1e-3)


@contextmanager
def ending_at(model, *tokens):
    """Inside, these tokens end a text."""
    config = model.original_model.generation_config
    before, config.eos_token_id = config.eos_token_id, [3, *tokens]
    try:
        yield
    finally:
        config.eos_token_id = before


@pytest.fixture(scope="module")
def requests_of(probe):
    """Four requests of three users and lengths; the first and the last share a prompt, not the heads."""
    users = (probe[0], probe[5], probe[10], probe[0])
    sizes = ((2, 40, 12), (1, 25, 8), (3, 60, 18), (2, 40, 12))

    def build(model, profile="own"):
        configs = [dps.PromptConfig(items=n, profile_tokens=p, task_tokens=t, response_tokens=4) for n, p, t in sizes]
        return [
            build_prompt(model, user.examples[0], profile, config=config)
            for user, config in zip(users, configs, strict=True)
        ]

    def both(model):
        own, none = build(model), build(model, "none")
        assert len({len(prompt.prompt_tokens) for prompt in (*own, *none)}) == 6
        return own, none

    return both


@pytest.fixture
def rows_run(monkeypatch, llama):
    """Rows that every decoding step ran, which are also those that its cache held."""
    counted, kind = [], type(runner_of(llama.hooked))
    real = kind.step

    def step(self, tokens, cache, mask):
        logits = real(self, tokens, cache, mask)
        rows = len(tokens) if mask is None else len(mask)
        assert {len(layer.keys) for layer in cache.layers} == {len(tokens)} == {rows} == {len(logits)}
        counted.append(len(tokens))
        return logits

    monkeypatch.setattr(kind, "step", step)
    return counted


def options_of(rule, own, none):
    """Arguments of `generate` and of `Naive`, for four rows."""
    options = {}
    if rule not in ("cad", "cos", "adacad", "dola"):
        options |= {"heads": SETS, "gamma": GAMMAS}
    if "cad" in rule or rule == "cos":
        options |= {"negative_prompts": none, "alpha": ALPHAS}
    each = [{name: values[row] for name, values in options.items()} for row in range(len(own))]
    return options, each


# 1. Greedy decoding, every rule.

FEW = ("gemma3", "qwen2", "gpt_neox")
CASES = [
    (architecture, rule)
    for architecture in ARCHITECTURES
    for rule in (("decore", "dola", "dps+cad", "adacad") if architecture in FEW else CONTRASTS)
]


@pytest.mark.parametrize(("architecture", "rule"), CASES)
def test_rules_equal_naive_decoding(tinies, requests_of, architecture, rule):
    tiny = tinies(architecture)
    own, none = requests_of(tiny.hooked)
    options, each = options_of(rule, own, none)
    out = generate(tiny.hooked, own, rule=rule, max_new_tokens=5, stop_at_eos=False, **options)
    for row, prompt in enumerate(own):
        check(Naive(tiny, rule, prompt, **each[row]), out, row)
    if rule != "amplify":
        # Branches of a small random model differ little, and with them the strength of divergence.
        least = 0.001 if rule in ("dps-js", "adacad") else 0.05
        assert max(float(values.abs().nan_to_num().max()) for values in out.shifts) > least
    assert no_hooks_left(tiny.hooked)


@pytest.mark.real
@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.full)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "rule", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in CONTRASTS]
)
def test_rules_in_a_mixed_batch_equal_naive_decoding_of_the_embedded_model(real, probe, rule, sampled):
    """Two users, lengths, head sets, strengths; γ = −1 and α = 0 among them where sampling."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(real.original_model.config._name_or_path).eval()
    cases = [(probe[0], 24), (probe[5], 14)]
    own, none = (
        [
            build_prompt(
                real, user.examples[0], which, config=dps.PromptConfig(items=1, profile_tokens=n, task_tokens=n)
            )
            for user, n in cases
        ]
        for which in ("own", "none")
    )
    assert len(own[0].prompt_tokens) != len(own[1].prompt_tokens)
    options = {}
    if rule not in ("cad", "cos", "adacad", "dola"):
        options["heads"] = [HeadSet.parse("L14H3,L2H1,L21H0"), HeadSet.parse("L9H8")]
        options["gamma"] = [0.8, -1.0 if sampled else 1.3]
    if "cad" in rule or rule == "cos":
        options |= {"negative_prompts": none, "alpha": [0.0 if sampled and rule != "cos" else 0.4, 0.7]}
    sampling, seeds = {"temperature": 0.8, "top_k": 20}, [5, 6]
    drawn = {"do_sample": True, "seed": seeds, **sampling} if sampled else {}
    out = generate(real, own, rule=rule, max_new_tokens=2, stop_at_eos=False, **options, **drawn)
    layers = {"layers": range(2, 16, 2)} if rule == "dola" else {}
    for row, prompt in enumerate(own):
        generator = torch.Generator().manual_seed(seeds[row])

        def choose(steered, generator=generator):
            return draw(steered, float(torch.rand((), dtype=torch.float64, generator=generator)), **sampling)

        each = {name: values[row] for name, values in options.items()} | layers
        naive = Naive(SimpleNamespace(plain=plain, hooked=real), rule, prompt, **each)
        check(naive, out, row, choose if sampled else largest)


@pytest.mark.parametrize(("rule", "cap"), [("dps-entropy", 2.0), ("dps-entropy", 6.02), ("decore", 6.02)])
def test_entropy_is_capped_where_it_is_above_max_gamma(llama, requests_of, rule, cap):
    own, none = requests_of(llama.hooked)
    options, each = options_of(rule, own, none)
    out = generate(
        llama.hooked,
        own,
        rule=rule,
        max_new_tokens=5,
        max_gamma=cap,
        stop_at_eos=False,
        **options,
    )
    entropies = []
    for row, prompt in enumerate(own):
        naive = Naive(llama, rule, prompt, max_gamma=cap, **each[row])
        check(naive, out, row)
        entropies += naive.measured
    assert max(entropies) > cap
    assert (min(entropies) < cap) == (cap > 6)


@pytest.mark.parametrize(
    ("architecture", "layers"), [("llama", (1, 2)), ("llama", (2,)), ("gpt2", (1, 2)), ("gemma2", (2, 1))]
)
def test_dola_contrasts_with_the_farthest_layer(tinies, requests_of, architecture, layers):
    tiny = tinies(architecture)
    own, _ = requests_of(tiny.hooked)
    out = generate(
        tiny.hooked,
        own,
        rule="dola",
        max_new_tokens=4,
        early_layers=list(layers),
        stop_at_eos=False,
    )
    for row, prompt in enumerate(own):
        naive = Naive(tiny, "dola", prompt, layers=layers)
        check(naive, out, row)
        if len(layers) == 2:
            pairs = np.array(naive.measured).reshape(-1, 2)
            assert np.abs(pairs[:, 0] - pairs[:, 1]).min() > GAP


def test_layers_to_contrast_are_every_second_one_of_the_lower_half():
    expected = {2: [1], 3: [1], 4: [2], 8: [2, 4], 12: [2, 4, 6], 30: [2, 4, 6, 8, 10, 12, 14]}
    for n_layers, layers in expected.items():
        assert layers_to_contrast(SimpleNamespace(cfg=SimpleNamespace(n_layers=n_layers)), None) == layers


@pytest.mark.parametrize("positions", ["all", "profile"])
@pytest.mark.parametrize("rule", ["dps+cad", "amplify+cad"])
def test_stacked_rules_edit_the_chosen_positions(llama, requests_of, rule, positions):
    own, none = requests_of(llama.hooked)
    options, each = options_of(rule, own, none)
    out = generate(
        llama.hooked,
        own,
        rule=rule,
        positions=positions,
        max_new_tokens=4,
        stop_at_eos=False,
        **options,
    )
    for row, prompt in enumerate(own):
        check(Naive(llama, rule, prompt, positions=positions, **each[row]), out, row)


def test_rows_of_a_batch_equal_single_runs(llama, requests_of):
    own, none = requests_of(llama.hooked)
    options, each = options_of("dps+cad", own, none)
    kept = {
        "rule": "dps+cad",
        "max_new_tokens": 4,
        "stop_at_eos": False,
        "keep_delta_logits": True,
    }
    batch = generate(llama.hooked, own, **options, **kept)
    for row, prompt in enumerate(own):
        alone = generate(llama.hooked, prompt, **each[row], **kept)
        assert alone.tokens[0].tolist() == batch.tokens[row].tolist()
        assert torch.allclose(alone.delta_logits[0], batch.delta_logits[row], atol=1e-4)


@pytest.mark.parametrize(("rule", "prompts"), [("dps", 3), ("dps+cad", 5), ("dola", 3)])
def test_equal_prompts_are_read_once(llama, requests_of, monkeypatch, rule, prompts):
    """All branches of a request, and the first and last request, share a pass: 3 prompts with profile, 2 without."""
    own, none = requests_of(llama.hooked)
    kind, read = type(runner_of(llama.hooked)), []
    real = kind.prefill
    monkeypatch.setattr(
        kind, "prefill", lambda self, tokens, *rest: read.append(len(tokens)) or real(self, tokens, *rest)
    )
    options, _ = options_of(rule, own, none)
    generate(llama.hooked, own, rule=rule, max_new_tokens=1, **options)
    assert read == [prompts]


def test_texts_are_contrasted_with_texts(llama):
    text, bare = "I bake bread.\nWrite a title:", "Write a title:"
    out = generate(
        llama.hooked,
        text,
        rule="cad",
        alpha=0.8,
        max_new_tokens=4,
        negative_prompts=bare,
        stop_at_eos=False,
    )

    def prompt(text):
        ids = torch.tensor([1, *llama.hooked.tokenizer(text, add_special_tokens=False)["input_ids"]])
        return SimpleNamespace(prompt_tokens=ids, spans={"response": (len(ids), len(ids)), "profile": (0, 0)})

    check(Naive(llama, "cad", prompt(text), negative_prompts=prompt(bare), alpha=0.8), out, 0)


# 2. Sampling.


@pytest.mark.parametrize("rule", ["dps", "dps+cad"])
@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.12}, {"temperature": 0.9, "top_k": 9}, {"temperature": 0.8, "top_k": 30, "top_p": 0.8}],
)
def test_sampling_equals_naive_sampling(llama, requests_of, rule, sampling):
    own, none = requests_of(llama.hooked)
    options, each = options_of(rule, own, none)
    seeds = [11, 12, 13, 14]
    drawn = {"do_sample": True, "seed": seeds, **sampling}
    out = generate(llama.hooked, own, rule=rule, max_new_tokens=5, stop_at_eos=False, **options, **drawn)
    for row, prompt in enumerate(own):
        generator = torch.Generator().manual_seed(seeds[row])

        def choose(steered, generator=generator):
            return draw(steered, float(torch.rand((), dtype=torch.float64, generator=generator)), **sampling)

        check(Naive(llama, rule, prompt, **each[row]), out, row, choose)


def test_every_row_is_sampled_in_its_own_way(llama, requests_of):
    own, none = requests_of(llama.hooked)
    options, each = options_of("dps+cad", own, none)
    ways = [
        {"temperature": 0.9, "top_k": 9},
        None,
        {"temperature": 0.12},
        {"temperature": 0.8, "top_k": 30, "top_p": 0.8},
    ]
    seeds = [11, 12, 13, 14]
    out = generate(
        llama.hooked,
        own,
        rule="dps+cad",
        max_new_tokens=5,
        stop_at_eos=False,
        sampling=[dps.Sampling(seed=seed, **way) if way else None for way, seed in zip(ways, seeds, strict=True)],
        **options,
    )
    for row, (prompt, way) in enumerate(zip(own, ways, strict=True)):
        generator = torch.Generator().manual_seed(seeds[row])

        def choose(steered, generator=generator, way=way):
            return draw(steered, float(torch.rand((), dtype=torch.float64, generator=generator)), **way)

        check(Naive(llama, "dps+cad", prompt, **each[row]), out, row, choose if way else largest)


@pytest.mark.parametrize("rule", ["dps", "dps+cad"])
def test_sampling_is_the_same_in_any_company(llama, requests_of, rule):
    own, none = requests_of(llama.hooked)
    seeds, sampled = [3, 4, 5, 3], {"rule": rule, "do_sample": True, "max_new_tokens": 8, "temperature": 0.9}

    def write(rows):
        options, _ = options_of(rule, own, none)
        options = {name: [values[row] for row in rows] for name, values in options.items()}
        chosen = {"seed": [seeds[row] for row in rows], **options, **sampled}
        out = generate(llama.hooked, [own[row] for row in rows], **chosen)
        return {row: tokens.tolist() for row, tokens in zip(rows, out.tokens, strict=True)}

    free = write([0, 1, 2, 3])
    with ending_at(llama.hooked, free[0][3], free[2][1]):
        batch = write([0, 1, 2, 3])
        assert len({len(tokens) for tokens in batch.values()}) > 2, "rows end at different steps"
        for rows in ([0], [1], [2], [3], [3, 1], [2, 3, 0]):
            assert write(rows) == {row: batch[row] for row in rows}
    for row, tokens in batch.items():
        assert tokens == free[row][: len(tokens)]


# 3. Rows that end, and branches that are not needed.


@pytest.mark.parametrize(
    ("rule", "positions"),
    [("dps", "response"), ("dps", "all"), ("dps", "profile"), ("dps+cad", "response"), ("dps+cad", "profile"),
     ("dola", "response")],
)  # fmt: skip
def test_rows_that_end_leave_the_batch(llama, requests_of, rows_run, rule, positions):
    own, none = requests_of(llama.hooked)
    options, each = options_of(rule, own, none)
    free = generate(
        llama.hooked,
        own,
        rule=rule,
        positions=positions,
        max_new_tokens=7,
        stop_at_eos=False,
        **options,
    )
    branches = {"dps": [2, 1, 2, 1], "dps+cad": [3, 2, 2, 3], "dola": [1, 1, 1, 1]}[rule]
    assert rows_run == [sum(branches)] * 7
    with ending_at(llama.hooked, int(free.tokens[1][1]), int(free.tokens[2][3])):
        rows_run.clear()
        out = generate(llama.hooked, own, rule=rule, positions=positions, max_new_tokens=7, **options)
        lengths = [len(tokens) for tokens in out.tokens]
        assert len(set(lengths)) > 1
        assert rows_run == [
            sum(n for n, length in zip(branches, lengths, strict=True) if step < length) for step in range(max(lengths))
        ]
        for row, prompt in enumerate(own):
            alone = generate(llama.hooked, prompt, rule=rule, positions=positions, max_new_tokens=7, **each[row])
            assert alone.tokens[0].tolist() == out.tokens[row].tolist()
            assert out.tokens[row].tolist() == free.tokens[row][: lengths[row]].tolist()
            for name in ("logprobs", "shifts", "kl"):
                one, other = getattr(alone, name)[0], getattr(out, name)[row]
                assert torch.allclose(one, other, atol=1e-4, equal_nan=True)
    assert no_hooks_left(llama.hooked)


@pytest.mark.parametrize("architecture", ["gemma2", "gpt2"])
def test_rows_that_stay_are_exact(tinies, requests_of, architecture):
    """The cache of a model with sliding windows, and learned positions, after rows have left it."""
    tiny = tinies(architecture)
    own, none = requests_of(tiny.hooked)
    options, each = options_of("dps+cad", own, none)
    free = generate(tiny.hooked, own, rule="dps+cad", max_new_tokens=2, stop_at_eos=False, **options)
    with ending_at(tiny.hooked, int(free.tokens[2][0]), int(free.tokens[0][1])):
        out = generate(tiny.hooked, own, rule="dps+cad", max_new_tokens=5, **options)
    assert len(out.tokens[2]) == 1
    assert max(len(tokens) for tokens in out.tokens) == 5
    for row, prompt in enumerate(own):
        check(Naive(tiny, "dps+cad", prompt, **each[row]), out, row)


# 4. Strength zero, and minus one.


@pytest.mark.parametrize("rule", ["dps", "dps-entropy", "decore", "amplify"])
def test_gamma_zero_is_the_model_in_one_branch(llama, requests_of, rows_run, rule):
    own, _ = requests_of(llama.hooked)
    out = generate(
        llama.hooked,
        own,
        rule=rule,
        heads=SETS,
        gamma=0.0,
        max_new_tokens=4,
        stop_at_eos=False,
        keep_delta_logits=True,
    )
    assert rows_run == [4] * 4
    for row, prompt in enumerate(own):
        check(Naive(llama, rule, prompt), out, row)
        assert not out.kl[row].any()
        assert not out.shifts[row].any()
        assert not out.delta_logits[row].any()


def test_alpha_zero_is_the_model_in_one_branch(llama, requests_of, rows_run):
    own, none = requests_of(llama.hooked)
    out = generate(
        llama.hooked,
        own,
        rule="cad",
        alpha=0.0,
        max_new_tokens=2,
        negative_prompts=none,
        stop_at_eos=False,
    )
    assert rows_run == [4] * 2
    assert not any(values.any() for values in (*out.kl, *out.shifts))


@pytest.mark.parametrize(("rule", "positions"), [("dps", "response"), ("dps", "all"), ("amplify", "response")])
def test_gamma_minus_one_is_the_masked_model_in_one_branch(llama, requests_of, rows_run, rule, positions):
    own, _ = requests_of(llama.hooked)
    options = {
        "rule": rule,
        "heads": SETS,
        "positions": positions,
        "max_new_tokens": 4,
        "stop_at_eos": False,
    }
    out = generate(llama.hooked, own, gamma=-1.0, **options)
    assert rows_run == [4] * 4
    for row, prompt in enumerate(own):
        naive = Naive(llama, "dps", prompt, heads=SETS[row], gamma=-1.0, positions=positions)
        check(naive, out, row)
        assert out.kl[row].isnan().all()
        assert out.shifts[row].isnan().all()
        assert out.logprobs[row].isfinite().all()
    rows_run.clear()
    mixed = generate(llama.hooked, own, gamma=[-1.0, 0.0, 1.0, -1.0], **options)
    assert rows_run == [4 if rule == "amplify" else 5] * 4
    assert [bool(values.isnan().any()) for values in mixed.kl] == [True, False, rule == "amplify", True]
    assert mixed.tokens[0].tolist() == out.tokens[0].tolist()


# 5. Heads with weights.


def test_weights_scale_z(llama, requests_of):
    own, none = requests_of(llama.hooked)
    sets = [{Head(0, 1): 0.5, Head(2, 3): 0.25}, {Head(1, 0): 1.0, Head(1, 2): 0.0}, {Head(0, 2): 0.8}, SETS[3]]
    shared = {
        "negative_prompts": none,
        "alpha": 0.5,
        "max_new_tokens": 4,
        "stop_at_eos": False,
    }
    for rule, gammas in (("dps", [1.5, 1.0, 2.0, 0.7]), ("dps", [-1.0] * 4), ("amplify+cad", [1.0, -1.0, 2.0, 0.5])):
        out = generate(llama.hooked, own, rule=rule, heads=sets, gamma=gammas, **shared)
        for row, prompt in enumerate(own):
            alpha = 0.5 if "cad" in rule else 0.0
            naive = Naive(
                llama, rule, prompt, heads=sets[row], gamma=gammas[row], negative_prompts=none[row], alpha=alpha
            )
            check(naive, out, row)


def test_weights_of_one_and_zero(llama, requests_of):
    own, _ = requests_of(llama.hooked)
    options = {
        "gamma": 1.3,
        "max_new_tokens": 4,
        "stop_at_eos": False,
        "keep_delta_logits": True,
    }
    plain, ones, zeros = (
        generate(llama.hooked, own, heads=heads, **options)
        for heads in (SETS, *([dict.fromkeys(heads, weight) for heads in SETS] for weight in (1.0, 0.0)))
    )
    off = generate(llama.hooked, own, heads=SETS, **options | {"gamma": 0.0})
    for row in range(4):
        assert ones.tokens[row].tolist() == plain.tokens[row].tolist()
        assert torch.equal(ones.delta_logits[row], plain.delta_logits[row])
        assert zeros.tokens[row].tolist() == off.tokens[row].tolist()
        assert zeros.delta_logits[row].abs().max() < 1e-4
    whole, halved = (
        generate(
            llama.hooked,
            own[0],
            heads={Head(1, 2): weight},
            ablation="uniform",
            **options,
        )
        for weight in (1.0, 0.0)
    )
    spread = generate(llama.hooked, own[0], heads=HeadSet.parse("L1H2"), ablation="uniform", **options)
    assert torch.equal(whole.delta_logits[0], spread.delta_logits[0])
    assert halved.delta_logits[0].abs().max() < 1e-4


def test_weights_out_of_range_are_refused(llama, requests_of):
    prompt = requests_of(llama.hooked)[0][0]
    for weight in (-0.1, 1.1, math.nan):
        with pytest.raises(SteeringError, match="between 0"):
            generate(llama.hooked, prompt, heads={Head(0, 1): weight})
    for options in ({"rule": "decore"}, {"ablation": "uniform"}, {"rule": "decore+cad", "negative_prompts": "a text"}):
        with pytest.raises(SteeringError, match="as a whole"):
            generate(llama.hooked, prompt, heads={Head(0, 1): 0.5}, **options)
    with pytest.raises(HeadError, match="L3H0 is not in this model"):
        generate(llama.hooked, prompt, heads={Head(3, 0): 0.5})


# 6. Plausibility, and the cap on the divergence.


def filtered(naive, share):
    """The reference, without the tokens that the full model finds implausible."""

    def run(new):
        full, steered = naive(new)
        p = softmax(steered if full is None else full)
        assert np.abs(p / p.max() - share).min() > 2e-5
        return full, np.where(p < share * p.max(), -np.inf, steered)

    return run


@pytest.mark.parametrize("rule", ["dps", "dps-entropy", "cad", "dps+cad"])
def test_implausible_tokens_are_ruled_out(llama, requests_of, rule):
    own, none = requests_of(llama.hooked)
    options, each = options_of(rule, own, none)
    options["gamma"] = gammas = [6.0, 0.0, 3.0, 4.0]
    options["alpha"] = [4.0] * 4
    out, free = (
        generate(
            llama.hooked,
            own,
            rule=rule,
            max_new_tokens=5,
            min_p=share,
            stop_at_eos=False,
            **options,
        )
        for share in (0.4, None)
    )
    shares = {"gain_left": [], "free": []}
    for row, prompt in enumerate(own):
        each[row] |= {"gamma": gammas[row]} if "heads" in each[row] else {}
        each[row] |= {"alpha": 4.0} if "negative_prompts" in each[row] else {}
        naive = Naive(llama, rule, prompt, **each[row])
        check(filtered(naive, 0.4), out, row)
        for name, found in (("gain_left", out), ("free", free)):
            for step, token in enumerate(found.tokens[row]):
                p = softmax(naive(found.tokens[row][:step])[0])
                shares[name].append(p[int(token)] / p.max())
    assert min(shares["gain_left"]) >= 0.4
    assert min(shares["free"]) < 0.4, "otherwise nothing was ruled out"


def test_sampled_tokens_are_plausible(llama, requests_of):
    own, _ = requests_of(llama.hooked)
    drawn = {"do_sample": True, "temperature": 20.0, "seed": [1, 2, 3, 4]}
    options = {"gamma": 0.5, "max_new_tokens": 6, "min_p": 0.1, "stop_at_eos": False}
    out = generate(llama.hooked, own, heads=SETS, **options, **drawn)
    for row, prompt in enumerate(own):
        for step, token in enumerate(out.tokens[row]):
            p = softmax(Naive(llama, "dps", prompt)(out.tokens[row][:step])[0])
            assert p[int(token)] >= 0.1 * p.max() * (1 - 1e-4)
    certain = generate(
        llama.hooked,
        own,
        heads=SETS,
        gamma=3.0,
        max_new_tokens=3,
        min_p=1.0,
        stop_at_eos=False,
        sampling=dps.Sampling(),
    )
    greedy = generate(llama.hooked, own, heads=SETS, gamma=0.0, max_new_tokens=3, stop_at_eos=False)
    assert [tokens.tolist() for tokens in certain.tokens] == [tokens.tolist() for tokens in greedy.tokens]


def drawn_back(naive, limit, bound):
    """The reference, moved towards the full model along a straight line until its divergence is the limit."""

    def run(new):
        full, steered = naive(new)
        bound.append(kl(steered, full) > limit)
        if not bound[-1]:
            return full, steered
        line = scipy.optimize.brentq(lambda s: kl(full + s * (steered - full), full) - limit, 0, 1, xtol=1e-12)
        return full, full + line * (steered - full)

    return run


@pytest.mark.parametrize("rule", ["dps", "dps-entropy", "cad", "dps+cad"])
def test_max_kl_caps_the_divergence(llama, requests_of, rule):
    own, none = requests_of(llama.hooked)
    options, each = options_of(rule, own, none)
    if "gamma" in options:
        options["gamma"] = gammas = [0.7, 0.0, 1.6, 3.0]
        each[3]["gamma"] = gammas[3]
    limit, bound = 0.4, []
    out = generate(
        llama.hooked,
        own,
        rule=rule,
        max_new_tokens=5,
        max_kl=limit,
        stop_at_eos=False,
        **options,
    )
    for row, prompt in enumerate(own):
        bound.append([])
        check(drawn_back(Naive(llama, rule, prompt, **each[row]), limit, bound[-1]), out, row)
        assert float(out.kl[row].max()) <= limit + 1e-4
        for value, binds in zip(out.kl[row].tolist(), bound[-1], strict=True):
            assert not binds or value == pytest.approx(limit, abs=1e-4)
    assert {binds for row in bound for binds in row} == {True, False}
    wide, free = (
        generate(
            llama.hooked,
            own,
            rule=rule,
            max_new_tokens=3,
            max_kl=cap,
            stop_at_eos=False,
            keep_delta_logits=True,
            **options,
        )
        for cap in (1000.0, None)
    )
    assert all(torch.equal(one, other) for one, other in zip(wide.delta_logits, free.delta_logits, strict=True))


def moved_to(naive, target, reached):
    """The reference, moved along its direction until its divergence is the target, or by 1024 nats."""

    def run(new):
        full, steered = naive(new)
        change = steered - full
        change = change / np.abs(change).max()

        def over(s):
            return kl(full + s * change, full) - target

        reached.append(over(1024) > 0)
        far = scipy.optimize.brentq(over, 0, 1024, xtol=1e-12) if reached[-1] else 1024
        return full, full + far * change

    return run


@pytest.mark.parametrize("rule", ["dps", "dps-entropy", "cad", "dps+cad"])
def test_target_kl_makes_every_step_equally_hard(llama, requests_of, rule):
    own, none = requests_of(llama.hooked)
    options, each = options_of(rule, own, none)
    if "gamma" in options:
        options["gamma"] = gammas = [0.7, 0.0, 1.6, 3.0]
        each[3]["gamma"] = gammas[3]
    for target in (0.02, 0.3):
        out = generate(llama.hooked, own, rule=rule, max_new_tokens=4, target_kl=target, stop_at_eos=False, **options)
        for row, prompt in enumerate(own):
            if not each[row].get("gamma", 0) and not each[row].get("alpha", 0):
                assert not bool(out.kl[row].any()), "a row that is not steered stays as it is"
                continue
            reached = []
            check(moved_to(Naive(llama, rule, prompt, **each[row]), target, reached), out, row)
            for value, there in zip(out.kl[row].tolist(), reached, strict=True):
                assert value == pytest.approx(target, abs=1e-3) or not there
            assert any(reached)


def test_logits_and_log_probabilities_give_one_distribution():
    """Each branch's normaliser is one number a row; it moves every token alike."""
    generator = np.random.default_rng(0)
    full, masked, without = generator.normal(0, 4, (3, 600))
    for gamma, alpha in ((1.5, 0.0), (-1.0, 0.0), (-0.4, 2.0), (0.0, 0.7), (3.0, 1.0)):
        of_logits = full + gamma * (full - masked) + alpha * (full - without)
        a, b, c = (log_softmax(one) for one in (full, masked, without))
        of_logprobs = a + gamma * (a - b) + alpha * (a - c)
        assert np.allclose(softmax(of_logits), softmax(of_logprobs), atol=1e-14)
        assert np.ptp(of_logits - of_logprobs) < 1e-11


def test_cos_is_cad(llama, requests_of):
    own, none = requests_of(llama.hooked)
    cad, cos = (
        generate(
            llama.hooked,
            own,
            rule=rule,
            alpha=ALPHAS,
            max_new_tokens=3,
            negative_prompts=none,
            stop_at_eos=False,
        )
        for rule in ("cad", "cos")
    )
    for name in ("tokens", "logprobs", "shifts", "kl"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(cad, name), getattr(cos, name), strict=True))


# 7. The formulas by themselves, against numpy in float64.


def rows_of_logits(*shape, seed=0, low=-1, high=2):
    """Rows from flat to so peaked that probabilities underflow."""
    scale = torch.logspace(low, high, shape[-2])[:, None]
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def test_entropy_and_divergence():
    full, steered = rows_of_logits(8, 40), rows_of_logits(8, 40, seed=1)
    got, far = terms.entropy(full), terms.kl_divergence(steered, full)
    for row in range(8):
        p = softmax(full[row].double().numpy())
        assert float(got[row]) == pytest.approx(-sum(x * math.log(x) for x in p.tolist() if x), abs=1e-5)
        a, b = (log_softmax(one[row].double().numpy()) for one in (steered, full))
        assert float(far[row]) == pytest.approx(sum(math.exp(x) * (x - y) for x, y in zip(a, b, strict=True)), rel=1e-4)
    assert terms.kl_divergence(full, full).tolist() == [0.0] * 8
    one_hot = torch.full((1, 40), -torch.inf).index_fill(1, torch.tensor([3]), 0.0)
    assert float(terms.kl_divergence(one_hot, torch.zeros(1, 40))) == pytest.approx(math.log(40), abs=1e-5)
    assert float(terms.entropy(one_hot)) == 0.0
    hard = terms.DivergenceTerm("negative").strength(torch.inf, full, steered)[:, 0]
    for row in range(len(full)):
        a, b = (softmax(one[row].double().numpy()) for one in (full, steered))
        assert float(hard[row]) == pytest.approx(js(a, b), abs=1e-5)
    assert float(terms.DivergenceTerm().strength(0.1, full, steered).max()) == pytest.approx(0.1)


def test_plausible():
    full, steered = rows_of_logits(8, 40), rows_of_logits(8, 40, seed=1)
    for share in (1e-3, 0.1, 0.5, 1.0):
        got = mixing.with_min_p(steered, full, share)
        for row in range(8):
            p = softmax(full[row].double().numpy())
            expected = [float(steered[row, i]) if p[i] >= share * p.max() else -math.inf for i in range(40)]
            assert got[row].tolist() == expected
    assert (mixing.with_min_p(steered, full, 1.0) > -torch.inf).sum(-1).tolist() == [1] * 8


def test_early_contrast():
    full, early = rows_of_logits(8, 40, low=0, high=1), rows_of_logits(4, 8, 40, low=0, high=1, seed=1)
    early[2] = full + 0.1 * early[2]
    # Two rows so peaked that the other tokens have probability 0 in float32.
    full[6:, :2] = 150
    early[:, 6:, :2] = 150 + torch.tensor([[[0.0, 3], [0, 1]], [[0, 1], [0, 3]], [[0, 0], [0, 0]], [[0, 2], [0, 2]]])
    log_p = full.log_softmax(-1)
    contrast = log_p - terms.farthest_early(full, early)
    got, chosen = mixing.with_min_p(contrast, full, 0.1), []
    for row in range(8):
        p, far = softmax(full[row].double().numpy()), []
        for layer in range(4):
            q = softmax(early[layer, row].double().numpy())
            halves = [
                sum(x * math.log(x / ((x + y) / 2)) for x, y in zip(one, other, strict=True) if x > 0)
                for one, other in ((p, q), (q, p))
            ]
            far.append(sum(halves) / 2)
        assert np.diff(np.sort(far)[-2:]) > 1e-5
        chosen.append(int(np.argmax(far)))
        expected = log_softmax(full[row].double().numpy()) - log_softmax(early[chosen[-1], row].double().numpy())
        expected = np.where(p < 0.1 * p.max(), -np.inf, expected)
        assert np.allclose(got[row].numpy(), expected, rtol=1e-5, atol=1e-4)
    assert len(set(chosen)) > 1
    assert 2 not in chosen, "the layer nearest to the full one is never chosen"


def test_capped():
    full = rows_of_logits(8, 40) / 10
    steered = full + rows_of_logits(8, 40, seed=1).flip(0) / 10
    for limit in (1e-3, 0.05, 0.5, 3.0):
        got, binding = mixing.within_kl(steered, full, limit), 0
        for row in range(8):
            a, b = (one[row].double().numpy() for one in (steered, full))
            if kl(a, b) <= limit:
                assert torch.equal(got[row], steered[row])
                continue
            binding += 1
            line = scipy.optimize.brentq(
                lambda s, a=a, b=b, limit=limit: kl(b + s * (a - b), b) - limit, 0, 1, xtol=1e-12
            )
            assert np.allclose(got[row].numpy(), b + line * (a - b), atol=2e-3 * np.abs(a - b).max())
            assert kl(got[row].double().numpy(), b) == pytest.approx(limit, rel=1e-2, abs=1e-5)
        assert binding > 0
    assert torch.equal(mixing.within_kl(steered, full, 1e6), steered)


# 8. Requests that do not fit together.


def test_bad_requests_are_named(llama, requests_of, unchecked):
    own, none = requests_of(llama.hooked)
    steer, contrast = {"heads": SETS}, {"negative_prompts": none}
    for options, message in (
        ({"rule": "dpss", **steer}, "rule 'dpss' is unknown"),
        ({"rule": "dps+", **steer}, "rule '' is unknown"),
        ({"rule": "dps+decore", **steer}, "'dps\\+decore' does not stack"),
        ({"rule": "dola+cad", **contrast}, "does not stack"),
        ({"rule": "dola+dps", **steer}, "does not stack"),
        ({"rule": "cad+cos", **contrast}, "does not stack"),
        ({"rule": "dps+amplify", **steer}, "does not stack"),
        ({"rule": "vector+head_vector", **steer}, "does not stack"),
        ({"rule": "head_vector+dps+cad", **steer, **contrast}, "does not stack"),
        ({"rule": "dps+cad+cos", **steer, **contrast}, "does not stack"),
        ({"rule": "dps"}, "needs heads="),
        ({"rule": "amplify+cad", **contrast}, "needs heads="),
        ({"rule": "cad"}, "needs negative_prompts="),
        ({"rule": "dps+cad", **steer}, "needs negative_prompts="),
        ({"rule": "cad", "negative_prompts": own}, "prompt 0 and its negative prompt are the same"),
        ({"rule": "cad", "negative_prompts": [*none[:3], own[3]]}, "prompt 3 and its negative prompt are the same"),
        ({"rule": "cad", "negative_prompts": none[:3]}, "4 prompts and 3 negative_prompts"),
        ({"rule": "cad", "negative_prompts": none[0]}, "4 prompts and 1 negative_prompts"),
        ({"rule": "cad", "alpha": [1.0], **contrast}, "1 values of alpha for 4 prompts"),
        ({"gamma": [1.0, 2.0], **steer}, "2 values of gamma for 4 prompts"),
        ({"do_sample": True, "seed": [1, 2, 3], **steer}, "3 values of sampling for 4 prompts"),
        ({"heads": SETS[:3]}, "4 prompts and 3 head sets"),
        ({"rule": "cad", "alpha": -0.1, **contrast}, "alpha -0.1 is not a number from 0 up"),
        ({"gamma": [0.0, 1.0, -1.01, 1.0], **steer}, "gamma -1.01 is not a number from -1 up"),
        ({"rule": "amplify", "ablation": "uniform", **steer}, "no ablation but the default"),
        ({"max_kl": 0.0, **steer}, "max_kl 0.0 is not a number above 0; nats, of which none leaves nothing to steer"),
        ({"max_kl": -1.0, **steer}, "leaves nothing to steer"),
        ({"max_kl": 1.0, "rule": "amplify", **steer}, "max_kl is measured from"),
        ({"max_kl": 1.0, "rule": "amplify+cad", **steer, **contrast}, "max_kl is measured from"),
        ({"max_kl": 1.0, "rule": "dola"}, "max_kl is measured from"),
        ({"max_kl": 1.0, "gamma": [1.0, 1.0, 1.0, -1.0], **steer}, "max_kl is measured from"),
        ({"max_kl": 1.0, "min_p": 0.1, **steer}, "max_kl is measured from"),
        ({"target_kl": 1.0, "rule": "amplify", **steer}, "target_kl is measured from"),
        ({"target_kl": 1.0, "max_kl": 2.0, **steer}, "give max_kl, a cap, or target_kl"),
        ({"target_kl": 0.0, **steer}, "target_kl 0.0 is not a number above 0"),
        ({"min_p": 0.0, **steer}, "min_p 0.0 is not a number above 0, at most 1"),
        ({"min_p": 1.5, **steer}, "min_p 1.5 is not a number above 0, at most 1"),
        ({"rule": "dola", "early_layers": []}, "early_layers \\[\\] are not layers between 1 and 2"),
        ({"rule": "dola", "early_layers": [0, 1]}, "early_layers"),
        ({"rule": "dola", "early_layers": [3]}, "early_layers"),
        ({"rule": "dola", "early_layers": [-1]}, "early_layers"),
    ):
        with pytest.raises(SteeringError, match=message):
            generate(llama.hooked, own, **options)
    assert no_hooks_left(llama.hooked)
    assert not runs_native(llama.hooked)


def test_a_long_prompt_without_its_profile_does_not_fit(llama, requests_of):
    own, _ = requests_of(llama.hooked)
    long = "the loaf " * 700
    for rule in ("cad", "dps+cad"):
        with pytest.raises(PromptError, match="do not fit the context of 1024"):
            generate(llama.hooked, own[0], rule=rule, heads=SETS[0], negative_prompts=long)
    generate(llama.hooked, own[0], heads=SETS[0], max_new_tokens=1, negative_prompts=long)


# 9. Hooks.

TOKENS = torch.arange(5, 25)[None].repeat(3, 1)


def hooked_layers(model, name="hook_z"):
    return [n for n in range(model.cfg.n_layers) if model.hook_dict[f"blocks.{n}.attn.{name}"].fwd_hooks]


@torch.no_grad()
def test_scale_multiplies_z_row_by_row(tiny):
    factors = torch.ones(3, 3, 4)
    factors[0, 0, 1], factors[0, 2, 3], factors[2, 0, 1] = 0.0, 1.8, 0.4
    where = torch.zeros(3, 20, dtype=torch.bool)
    where[:, 7:12], where[2, 15:] = True, True
    prompt = dps.Prompt(torch.arange(20), {"response": (15, 20), "profile": (3, 9)}, "", "own", "", "", ())
    for chosen, positions in (
        (None, [range(20)] * 3),
        (window(prompt, "profile"), [range(3, 9)] * 3),
        (lambda n_pos: where, [row.nonzero().flatten().tolist() for row in where]),
        (lambda n_pos: None, [[]] * 3),
    ):
        with Scale(factors, *([chosen] if chosen else [])).on(tiny.hooked):
            assert hooked_layers(tiny.hooked) == [0, 2], "a layer that is not edited carries no hook"
            got = tiny.hooked(TOKENS)
        assert no_hooks_left(tiny.hooked)
        for row in range(3):
            with ExitStack() as stack:
                for layer, head in (factors[row] != 1).nonzero().tolist():
                    columns, factor = slice(8 * head, 8 * head + 8), factors[row, layer, head]
                    new = lambda z, c=columns, f=factor: z[..., c] * f  # noqa: E731
                    stack.enter_context(columns_replaced(tiny.plain, layer, head, 8, list(positions[row]), new))
                expected = tiny.plain(input_ids=TOKENS[row : row + 1]).logits[0]
            assert torch.allclose(got[row], expected, atol=2e-4)


@torch.no_grad()
def test_scale_nests_with_ablate(llama):
    model, factors = llama.hooked, torch.ones(3, 3, 4)
    factors[:, 1, 2] = 0.0
    factors[1, 0, 0] = 2.0
    with dps.ablate(model, HeadSet.parse("L0H1"), positions="all"):
        before = model(TOKENS)
        with Scale(factors).on(model):
            both = model(TOKENS)
            assert hooked_layers(model) == [0, 1]
        assert torch.equal(model(TOKENS), before)
        assert hooked_layers(model) == [0]
    with dps.ablate(model, HeadSet.parse("L0H1,L1H2"), positions="all"):
        together = model(TOKENS)
    assert torch.allclose(both[[0, 2]], together[[0, 2]], atol=1e-5)
    assert not torch.allclose(both[1], together[1], atol=1e-2)
    factors[:, 0, 1] = 0.0
    with Scale(factors).on(model):
        assert torch.allclose(model(TOKENS), both, atol=1e-5)
    with pytest.raises(RuntimeError, match="stop"), Scale(factors).on(model):
        raise RuntimeError("stop")
    assert no_hooks_left(model)


def test_scale_keeps_the_precision_of_z():
    z = torch.randn(2, 3, 4, 8, dtype=torch.bfloat16)
    factors = torch.tensor([1.0, 0.0, 0.5, 1.1]).view(1, 1, 4, 1)
    for where in (lambda n: slice(None), lambda n: slice(1, None), lambda n: None):
        edited = Scale(torch.ones(2, 1, 4), where)._z(factors, z, None)
        assert edited.dtype == torch.bfloat16
        assert torch.equal(edited[:, :, 0], z[:, :, 0]), "a factor of 1 changes nothing, to the bit"


@pytest.mark.parametrize("positions", ["response", "all", "profile"])
@pytest.mark.parametrize("rule", ["dps", "decore", "dps+cad", "dola"])
def test_an_exception_inside_the_loop_leaves_nothing_behind(llama, requests_of, monkeypatch, rule, positions):
    own, none = requests_of(llama.hooked)
    options, _ = options_of(rule, own, none)
    calls, real = [], Chooser.__call__

    def raises(self, logits, running):
        calls.append(len(logits))
        if len(calls) == 2:
            raise RuntimeError("stop")
        return real(self, logits, running)

    with torch.no_grad(), dps.ablate(llama.hooked, HeadSet.parse("L1H1"), positions="all"):
        before = llama.hooked(TOKENS)
        monkeypatch.setattr(Chooser, "__call__", raises)
        # While the traceback holds the frames, nothing is cleaned up by the garbage collector.
        with pytest.raises(RuntimeError, match="stop") as held:
            generate(
                llama.hooked,
                own,
                rule=rule,
                positions=positions,
                stop_at_eos=False,
                **options,
            )
        assert hooked_layers(llama.hooked) == [1], "hooks of others stay"
        assert torch.equal(llama.hooked(TOKENS), before)
    assert no_hooks_left(llama.hooked)
    assert not runs_native(llama.hooked)
    assert len(calls) == 2
    assert held.tb is not None


def test_hooks_sit_where_a_running_row_is_edited(llama, requests_of, monkeypatch):
    own, none = requests_of(llama.hooked)
    seen, real, early = [], Chooser.__call__, ()

    def look(self, logits, running):
        assert not logits.requires_grad
        names = ("hook_z", "hook_attn_scores")
        seen.append(tuple(hooked_layers(llama.hooked, name) for name in names))
        expected = ("hook_z", "o.hook_in", "hook_attn_scores", *early)
        others = [name for name, point in llama.hooked.hook_dict.items() if name.startswith("blocks") and
                  point.fwd_hooks and not name.endswith(expected)]  # fmt: skip
        assert not others
        return real(self, logits, running)

    monkeypatch.setattr(Chooser, "__call__", look)
    sets = [HeadSet.parse(names) for names in ("L0H1", "L1H0", "L2H0", "L2H2")]
    options = {
        "max_new_tokens": 3,
        "stop_at_eos": False,
        "negative_prompts": none,
        "heads": sets,
    }
    for rule, positions, gammas, expected in (
        ("dps", "response", [1.0, 0.0, 1.0, 0.0], ([0, 2], [])),
        ("dps", "all", [1.0, 0.0, 0.0, -1.0], ([0, 2], [])),
        ("dps", "profile", [1.0] * 4, ([], [])),
        ("amplify+cad", "response", [0.0, 2.0, 0.0, 0.0], ([1], [])),
        ("decore", "response", [0.0, 1.0, 0.0, 0.0], ([], [1])),
        ("cad", "response", [1.0] * 4, ([], [])),
        ("dola", "response", [1.0] * 4, ([], [])),
    ):
        seen.clear()
        early = ("1.hook_resid_pre", "1.hook_in") if rule == "dola" else ()
        generate(llama.hooked, own, rule=rule, positions=positions, gamma=gammas, **options)
        assert seen == [expected] * 3, (rule, positions)
    free = generate(llama.hooked, own, rule="dps", gamma=[0.0, 0.0, 2.0, 0.0], **options)
    with ending_at(llama.hooked, int(free.tokens[2][0])):
        seen.clear()
        out = generate(llama.hooked, own, gamma=[0.0, 1.0, 2.0, 0.0], heads=sets, max_new_tokens=3)
    assert len(out.tokens[2]) == 1
    assert seen == [([1, 2], []), ([1], []), ([1], [])], "the hook of a row that left goes with it"
    assert no_hooks_left(llama.hooked)


def test_edits_around_the_call_stay(llama, requests_of):
    """Rows leave and hooks are laid anew; an ablation outside of `generate` still acts on every row."""
    own, _ = requests_of(llama.hooked)
    with dps.ablate(llama.hooked, HeadSet.parse("L1H2"), positions="all"):
        free = generate(
            llama.hooked,
            own[:2],
            heads=SETS[:2],
            gamma=1.2,
            max_new_tokens=5,
            stop_at_eos=False,
        )
        with ending_at(llama.hooked, int(free.tokens[1][1])):
            out = generate(llama.hooked, own[:2], heads=SETS[:2], gamma=1.2, max_new_tokens=5)
    assert sorted({len(tokens) for tokens in out.tokens}) == [2, 5]
    for row in range(2):
        with columns_replaced(llama.plain, 1, 2, 8, slice(None), 0.0):
            check(Naive(llama, "dps", own[row], heads=SETS[row], gamma=1.2), out, row)
