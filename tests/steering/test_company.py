"""What a row gets does not depend on its company: all kinds of positions, unequal lengths, beside plain passes."""

from contextlib import ExitStack

import pytest
import torch
import transformers
from conftest import CONTEXT, SIZES, make_tokenizer
from flat import generate
from oracles import columns_replaced

import dps_lens as dps
from dps_lens.data import Prompt
from dps_lens.errors import PromptError
from dps_lens.heads import HeadSet
from dps_lens.model import runner_of
from dps_lens.model.positions import RotarySwitch, is_long, rotary_switch
from dps_lens.scoring import CleanRun

GQA = {"num_key_value_heads": 2}
SWITCH = 40
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
ALIBI = {**SIZES, **CONTEXT, "alibi": True, "new_decoder_architecture": False, "multi_query": True}
KINDS = {
    "ALiBi": (transformers.BloomConfig, {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "ALiBi by flag": (transformers.FalconConfig, ALIBI),
    "ALiBi bias": (
        transformers.MptConfig,
        {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 1024, "expansion_ratio": 2},
    ),
    "absolute with an offset": (
        transformers.OPTConfig,
        {**SIZES, **CONTEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    ),
    "rotary with a switch": (
        transformers.Phi3Config,
        {**SIZES, **CONTEXT, **GQA, "original_max_position_embeddings": SWITCH, "rope_parameters": LONGROPE},
    ),
    "sliding window": (transformers.MistralConfig, {**SIZES, **CONTEXT, **GQA, "sliding_window": 24}),
    "experts": (
        transformers.MixtralConfig,
        {**SIZES, **CONTEXT, **GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
# Profile and length of each prompt; with 6 new tokens, two stay below the switch and one begins beyond it.
PROMPTS = [((1, 4), 7), ((3, 20), 31), ((5, 30), 58)]
HEADS = HeadSet.parse("L0H1,L1H2")
NEW, GAMMA = 6, 1.5


def made(folder, kind):
    """A hooked model and its plain twin."""
    config, options = KINDS[kind]
    torch.manual_seed(0)
    config = config(vocab_size=600, bos_token_id=1, eos_token_id=3, pad_token_id=3, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return dps.load_model(str(folder)), plain


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    pairs = {}

    def get(kind):
        if kind not in pairs:
            pairs[kind] = made(tmp_path_factory.mktemp("model"), kind)
        return pairs[kind]

    return get


def prompt_of(profile, length, seed=0):
    ids = torch.randint(10, 600, (length,), generator=torch.Generator().manual_seed(seed + length))
    spans = {"profile": profile, "task": (profile[1], length), "response": (length, length)}
    return Prompt(ids, spans, "", "own", "", "", ())


@torch.no_grad()
def naive(plain, prompt, gamma, positions):
    """Greedy decoding by definition: whole passes without a cache, one row. Tokens, and the change of their logits."""
    start, ids, changes = len(prompt.tokens), prompt.tokens, []
    where = {"response": slice(start - 1, None), "all": slice(None), "profile": slice(*prompt.spans["profile"])}
    for _ in range(NEW):
        full = plain(input_ids=ids[None], use_cache=False).logits[0, -1]
        with ExitStack() as stack:
            for layer, head in HEADS:
                stack.enter_context(columns_replaced(plain, layer, head, 8, where[positions], 0.0))
            masked = plain(input_ids=ids[None], use_cache=False).logits[0, -1]
        changes.append(gamma * (full - masked))
        ids = torch.cat([ids, (full + changes[-1]).argmax()[None]])
    return ids[start:].tolist(), torch.stack(changes)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_equal_lone_passes_without_a_cache(pair_of, kind):
    model, plain = pair_of(kind)
    prompts = [prompt_of(*one) for one in PROMPTS]
    for gamma, positions in ((0.0, "response"), (GAMMA, "response"), (GAMMA, "all"), (GAMMA, "profile")):
        options = {"gamma": gamma, "positions": positions, "max_new_tokens": NEW}
        out = generate(model, prompts, heads=HEADS, stop_at_eos=False, keep_delta_logits=True, **options)
        for prompt, tokens, deltas in zip(prompts, out.tokens, out.delta_logits, strict=True):
            expected, changes = naive(plain, prompt, gamma, positions)
            assert tokens.tolist() == expected
            assert float((deltas - changes).abs().max()) < 1e-4


def test_rows_beyond_the_switch_leave_and_stay(pair_of):
    """Rows that end, branches on both sides of the switch, and sampling: as for each prompt alone."""
    model, plain = pair_of("rotary with a switch")
    prompts = [prompt_of(*one) for one in PROMPTS]
    tokens = naive(plain, prompts[2], GAMMA, "response")[0]
    model.tokenizer.eos_token = model.tokenizer.decode(tokens[1])
    try:
        together = generate(model, prompts, heads=HEADS, gamma=GAMMA, max_new_tokens=NEW)
        apart = [generate(model, one, heads=HEADS, gamma=GAMMA, max_new_tokens=NEW) for one in prompts]
    finally:
        model.tokenizer.eos_token = "<|im_end|>"
    assert [row.tolist() for row in together.tokens] == [one.tokens[0].tolist() for one in apart]
    assert {len(row) for row in together.tokens} != {NEW}
    options = {"rule": "cad", "alpha": 0.7, "max_new_tokens": 3, "keep_delta_logits": True, "stop_at_eos": False}
    out = generate(model, prompts[2], negative_prompts=prompts[0], **options)
    with torch.no_grad():
        ends = [plain(input_ids=one.tokens[None]).logits[0, -1] for one in (prompts[2], prompts[0])]
    assert float((out.delta_logits[0][0] - 0.7 * (ends[0] - ends[1])).abs().max()) < 1e-4
    streams = [generate(model, one, heads=HEADS, gamma=GAMMA, max_new_tokens=NEW, stream=True) for one in prompts]
    left = [iter(stream) for stream in streams]
    while left:
        left = [one for one in left if next(one, None) is not None]
    full = [generate(model, one, heads=HEADS, gamma=GAMMA, max_new_tokens=NEW) for one in prompts]
    assert [one.generation.texts for one in streams] == [one.texts for one in full]


def test_texts_that_cross_the_switch_are_refused(pair_of):
    model, plain = pair_of("rotary with a switch")
    prompt = prompt_of((3, 20), 38)
    fits = SWITCH - 37
    with pytest.raises(PromptError, match=rf"37 cached tokens grow to 41 across 40.* at most {fits} more tokens fit"):
        generate(model, prompt, heads=HEADS, max_new_tokens=fits + 1)
    out = generate(model, prompt, heads=HEADS, gamma=GAMMA, max_new_tokens=fits, stop_at_eos=False)
    assert out.tokens[0].tolist() == naive(plain, prompt, GAMMA, "response")[0][:fits]
    long = Prompt(prompt_of((3, 20), 45).tokens, prompt.spans | {"response": (38, 45)}, "", "own", "one", "", ())
    with pytest.raises(PromptError, match="'one': 37 cached tokens grow to 44 across 40"):
        CleanRun(runner_of(model), long)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(plain(long.tokens[None]).logits[0, 37:44], long.tokens[38:])
    assert abs(CleanRun(runner_of(model), long, positions="all").nll - float(losses)) < 1e-4
    with pytest.raises(PromptError, match="shorten the prompt to less than 40 tokens"):
        generate(model, prompt_of((3, 20), 41), heads=HEADS, max_new_tokens=1)


def test_where_rotary_factors_change(pair_of, tmp_path, llama):
    assert rotary_switch(llama.hooked) is None
    assert not is_long(llama.hooked, 10**6)
    model = pair_of("rotary with a switch")[0]
    assert rotary_switch(model) == RotarySwitch(SWITCH, settles=True)
    assert [is_long(model, tokens) for tokens in (SWITCH, SWITCH + 1)] == [False, True]
    config = transformers.LlamaConfig(
        vocab_size=600, **SIZES, max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 4.0}
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = dps.load_model(str(tmp_path))
    assert rotary_switch(model) == RotarySwitch(63, settles=False)
    with pytest.raises(PromptError, match="each longer pass takes its own"):
        generate(model, prompt_of((1, 2), 60), heads=HEADS, max_new_tokens=5)
