"""The compiled step writes what the plain one writes: every rule, every architecture, rows that leave."""

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
import torch
import transformers
from conftest import no_hooks_left

import dps_lens as dps
from dps_lens.errors import ModelCheckError, SteeringError
from dps_lens.heads import HeadSet
from dps_lens.intervene import Ablation, Mean
from dps_lens.model import wrap_model
from dps_lens.steering import compiled, generate
from dps_lens.steering.compiled import program_of

SETS = [HeadSet.parse(names) for names in ("L0H1,L2H3", "L1H0", "L0H2,L1H1,L2H0")]
RULES = ["greedy", "dps", "dps-entropy", "dps-patch", "decore", "cad", "dola", "amplify", "vector", "head_vector",
         "dps+cad", "head_vector+dps", "vector+dola"]  # fmt: skip
N = 20
OF_HEADS = ("dps", "decore", "amplify")


@pytest.fixture
def as_it_stands(monkeypatch):
    """The same step without torch.compile, which takes seconds a rule: compared are the edits and the caches."""
    monkeypatch.setattr(compiled, "_BACKEND", None)
    monkeypatch.setattr(compiled, "_PROGRAMS", WeakKeyDictionary())
    monkeypatch.setattr(compiled, "tried", lambda model, name, trial: trial())


@pytest.fixture
def prompts(llama, probe, short):
    examples = [user.examples[0] for user in probe[:3]]
    return {
        which: [dps.build_prompt(llama.hooked, example, which, config=short) for example in examples]
        for which in ("own", "none")
    }


def asked(model, rule, prompts):
    """Arguments of `generate` for a rule."""
    given = {"rule": rule, "prompts": prompts["own"]}
    parts = rule.split("+")
    if any(part.startswith(OF_HEADS) for part in parts):
        given["heads"] = SETS
    if not {"greedy", "dps-entropy", "decore", "cad", "dola"} & {rule}:
        given["gamma"] = [0.7, 1.6, -1.0] if rule == "dps" else [0.7, 0.2, 1.1]
    if "cad" in parts or "+" in rule:
        given["alpha"] = [0.5, 1.5, 1.0]
    if "cad" in parts or "dps-patch" in parts:
        given["negative_prompts"] = prompts["none"]
    generator = torch.Generator().manual_seed(3)
    cfg = model.cfg
    if parts[0] == "vector":
        given["vectors"] = [dps.SteeringVector(torch.randn(cfg.d_model, generator=generator), n) for n in range(3)]
    if parts[0] == "head_vector":
        given["vectors"] = [
            dps.HeadVector(torch.randn(len(one), cfg.d_head, generator=generator), HeadSet(one, shape=(3, 4)))
            for one in SETS
        ]
    return given


def same(model, given, config=None, **options):
    """The same tokens and numbers with and without compile."""
    config = config or {}
    plain, ours = (
        generate(
            model, max_new_tokens=N, decode_config=dps.DecodeConfig(compile=compile_, **config), **given, **options
        )
        for compile_ in (False, True)
    )
    for row, other in zip(plain.tokens, ours.tokens, strict=True):
        assert row.tolist() == other.tolist()
    for name in ("logprobs", "shifts", "kl"):
        for row, other in zip(getattr(plain, name), getattr(ours, name), strict=True):
            torch.testing.assert_close(other, row, atol=2e-3, rtol=1e-3, equal_nan=True)
    assert no_hooks_left(model)
    return ours


@pytest.mark.parametrize("positions", ["response", "all", "profile"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.usefixtures("as_it_stands")
def test_rules(llama, prompts, rule, positions):
    if positions != "response" and ("vector" in rule or "patch" in rule):
        pytest.skip("added and patched from the last prompt token on")
    same(llama.hooked, asked(llama.hooked, rule, prompts), positions=positions)


@pytest.mark.usefixtures("as_it_stands")
def test_every_architecture(tiny, probe, short):
    """Where the step with static caches is not the model's own, it is refused."""
    model = tiny.hooked
    prompts = {
        which: [dps.build_prompt(model, user.examples[0], which, config=short) for user in probe[:3]]
        for which in ("own", "none")
    }
    try:
        program_of(model)
    except ModelCheckError as error:
        pytest.skip(str(error))
    for rule in ("dps", "head_vector"):
        if rule == "dps" or model.cfg.n_heads == 4:
            same(model, asked(model, rule, prompts))


@pytest.mark.usefixtures("as_it_stands")
def test_rows_leave_when_half_of_the_batch_is_idle(llama, prompts, monkeypatch):
    """Rows that end are not written on; what the others write does not change."""
    model = llama.hooked
    given = asked(model, "dps", prompts)
    alone = generate(model, max_new_tokens=N, decode_config=dps.DecodeConfig(stop_at_eos=False), **given)
    ends = {alone.tokens[0][2].item(), alone.tokens[1][9].item()}
    monkeypatch.setattr(sys.modules["dps_lens.steering.plan"], "end_tokens", lambda _: ends)
    written = same(model, given)
    assert len({len(row) for row in written.tokens}) > 1
    streamed = generate(model, max_new_tokens=N, decode_config=dps.DecodeConfig(compile=True), stream=True, **given)
    texts = [""] * 3
    for row, piece in streamed:
        texts[row] += piece
    assert texts == written.texts


@pytest.mark.usefixtures("as_it_stands")
@pytest.mark.parametrize("config", [{"max_kl": 0.1}, {"target_kl": 0.1}, {"min_p": 0.1}, {"keep_alternatives": 2}])
def test_what_is_done_to_logits(llama, prompts, config):
    same(llama.hooked, asked(llama.hooked, "dps", prompts) | {"gamma": 0.8}, config)


@pytest.mark.usefixtures("as_it_stands")
def test_sampling_and_other_ablations(llama, prompts):
    sampling = [dps.Sampling(seed=1), None, dps.Sampling(temperature=0.7, top_p=0.9, seed=2)]
    given = asked(llama.hooked, "dps", prompts) | {"sampling": sampling}
    same(llama.hooked, given)
    cfg = llama.hooked.cfg
    mean = torch.randn(cfg.n_layers, cfg.n_heads, cfg.d_head, generator=torch.Generator().manual_seed(1))
    same(llama.hooked, given, {"ablation": Mean(z=mean)})
    same(llama.hooked, given, {"ablation": "uniform"})

    class Halved(Ablation):
        name = "halved"

        def replace(self, activation, values):
            return activation / 2

    same(llama.hooked, given, {"ablation": Halved()})


class Sharper(Ablation):
    name, site = "sharper", "hook_attn_scores"

    def replace(self, activation, values):
        return 2 * activation


def test_what_a_compiled_step_cannot_do_is_refused(llama, prompts):
    given = asked(llama.hooked, "dps", prompts)
    with pytest.raises(SteeringError, match="'sharper' edits attention scores, which a compiled step does not compute"):
        generate(llama.hooked, decode_config=dps.DecodeConfig(compile=True, ablation=Sharper()), **given)


@pytest.mark.usefixtures("as_it_stands")
def test_long_prompts_in_windows(tinies, probe):
    """Sliding windows of 24 positions, caches past a border of 256, and a second batch in the first one's cache."""
    for name in ("gemma3", "gemma2", "llama"):
        model = tinies(name).hooked
        config = dps.PromptConfig(items=8, profile_tokens=260, task_tokens=60)
        prompts = {
            which: [dps.build_prompt(model, user.examples[0], which, config=config) for user in probe[:3]]
            for which in ("own", "none")
        }
        assert max(len(prompt.tokens) for prompt in prompts["own"]) > 256
        for rule in ("dps", "decore", "dps"):
            same(model, asked(model, rule, prompts))


@pytest.mark.usefixtures("as_it_stands")
def test_two_streams_do_not_share_a_cache(llama, prompts):
    given, config = asked(llama.hooked, "dps", prompts), dps.DecodeConfig(compile=True)
    whole = generate(llama.hooked, max_new_tokens=N, **given).texts
    streams = [generate(llama.hooked, max_new_tokens=N, decode_config=config, stream=True, **given) for _ in "ab"]
    texts = [[""] * 3, [""] * 3]
    for pieces in zip(*map(iter, streams), strict=True):
        for text, (row, piece) in zip(texts, pieces, strict=True):
            text[row] += piece
    assert texts == [whole, whole]


@pytest.mark.usefixtures("as_it_stands")
def test_hooks_of_others_are_refused_and_spoil_nothing(llama, prompts):
    model, given = llama.hooked, asked(llama.hooked, "dps", prompts)
    config = dps.DecodeConfig(compile=True)
    with (
        dps.ablate(model, HeadSet.parse("L1H2"), positions="all"),
        pytest.raises(SteeringError, match="there are hooks on the model"),
    ):
        generate(model, decode_config=config, **given)
    same(model, given)
    stream = iter(generate(model, decode_config=config, stream=True, max_new_tokens=N, **given))
    next(stream)
    with (
        dps.ablate(model, HeadSet.parse("L1H2"), positions="all"),
        pytest.raises(SteeringError, match="there are hooks on the model"),
    ):
        list(stream)


@pytest.mark.usefixtures("as_it_stands")
def test_a_program_is_of_one_model_and_ends_with_it(tiny_folders, prompts):
    model = dps.load_model(str(tiny_folders["llama"]))
    given = asked(model, "dps", prompts)
    same(model, given)
    other = copy.deepcopy(model)
    same(other, given)
    assert program_of(other) is not program_of(model)
    first = program_of(model)
    model.to(torch.bfloat16)
    assert program_of(model) is not first, "made anew for other numbers"
    del model, other, first, given
    gc.collect()
    assert not compiled._PROGRAMS


@pytest.mark.usefixtures("as_it_stands")
def test_attention_that_windows_by_the_length_of_its_cache_is_refused(tmp_path, tiny_folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folders["llama"])
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    config = transformers.GPTNeoConfig(**sizes, window_size=256, vocab_size=len(tokenizer), max_position_embeddings=512)
    model = wrap_model(
        transformers.GPTNeoForCausalLM(config).eval(), tokenizer, "neo", device="cpu", dtype=torch.float32
    )
    with pytest.raises(ModelCheckError, match="compile=True does not go with this model"):
        program_of(model)


@pytest.mark.full
def test_torch_compiles_one_graph_a_shape(tiny_folders):
    """By inductor, in a process whose functions nobody wraps to check their arguments."""
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("compiled_graphs.py"), *tiny_folders.values()],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
