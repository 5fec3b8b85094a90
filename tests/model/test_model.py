"""Loading and checking models; passes against the plain model."""

import shutil
import warnings

import pytest
import torch
from conftest import make_hf_model, make_tokenizer, no_hooks_left
from pcs import score_pcs

import dps_lens as dps
from dps_lens.errors import ModelCheckError, ModelLoadError
from dps_lens.model import describe_model, native_attention
from dps_lens.model.runners import runner_of

TOKENS = torch.arange(5, 35)[None]


def test_check_model_passes_and_reports(tiny):
    found = dps.check_model(tiny.hooked, reference=tiny.plain)
    assert set(found) == {"ablation", "prompt", "restart", "padding", "native attention", "parity"}
    assert all(error < 1e-3 for error in found.values())
    assert set(dps.check_model(tiny.hooked)) == set(found)
    assert no_hooks_left(tiny.hooked)


def test_check_model_says_what_is_wrong(tiny_folders):
    model = dps.load_model(str(tiny_folders["llama"]))
    other = make_hf_model("llama", seed=9)
    with pytest.raises(ModelCheckError, match="parity"):
        dps.check_model(model, reference=other)
    # A projection that reads the heads in another order: the hook no longer matches the columns.
    projection = model.blocks[1].attn.o
    real_forward = type(projection).forward

    def rolled(z, *args, **kwargs):
        return projection.original_component(projection.hook_in(z).roll(8, -1), *args, **kwargs)

    object.__setattr__(projection, "forward", rolled)
    with pytest.raises(ModelCheckError, match=r"zeroing L1H1 at hook_z"):
        dps.check_model(model)
    object.__delattr__(projection, "forward")
    assert type(projection).forward is real_forward
    dps.check_model(model)


@torch.inference_mode()
def test_passes_agree_with_one_whole_pass(tiny):
    runner = runner_of(tiny.hooked)
    whole = tiny.plain(input_ids=TOKENS).logits
    with native_attention(tiny.hooked):
        prompt = runner.prefill(TOKENS[:, :20])
        residuals = dict.fromkeys(range(3))
        rest = runner.logits(TOKENS[:, 20:], prompt=prompt, record=residuals, keep=4)
        assert torch.allclose(rest, whole[:, -4:], atol=1e-4)
        assert sorted(residuals) == [0, 1, 2]
        starts = {1: residuals[1].expand(2, -1, -1), 2: residuals[2].expand(3, -1, -1)}
        joined = runner.resume(starts, TOKENS[:, 20:], prompt=prompt, keep=4)
        assert torch.allclose(joined, whole[:, -4:].expand(5, -1, -1), atol=1e-4)
        again = runner.logits(TOKENS[:, 20:], prompt=prompt, keep=4)
        assert torch.equal(again, rest), "the prompt's cache was written to"
        cache = runner.start_decoding(prompt, torch.tensor([0, 0]))
        mask = torch.ones(2, 20, dtype=torch.long)
        for position in range(20, 24):
            mask = torch.cat([mask, mask[:, :1]], 1)
            step = runner.step(TOKENS[:, position : position + 1].expand(2, -1), cache, mask)
            assert torch.allclose(step, whole[:, position].expand(2, -1), atol=1e-4)


def shared_calls(monkeypatch):
    """Counts attention over a shared prompt in place."""
    from transformers import AttentionInterface

    from dps_lens.model.fast import shared

    shared._register()
    calls, attend = [], AttentionInterface._global_mapping[shared._NAME]

    def counted(module, *args, **kwargs):
        calls.append(module)
        return attend(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, shared._NAME, counted)
    return calls


@torch.inference_mode()
def test_rows_attend_to_a_shared_prompt_in_place(tiny, monkeypatch):
    calls, runner, model = shared_calls(monkeypatch), runner_of(tiny.hooked), tiny.hooked
    rows = torch.stack([torch.arange(7, 14), torch.arange(90, 97), torch.arange(200, 207)])
    # Longer than the sliding windows of the test models.
    prompt_tokens = torch.arange(5, 45)[None]
    with native_attention(model):
        prompt = runner.prefill(prompt_tokens)
        got = runner.logits(rows, prompt=prompt)
        one = runner.logits(rows[:, :1], prompt=prompt)
    capped = getattr(tiny.plain.config, "attn_logit_softcapping", None) is not None
    assert len(calls) == (0 if capped else 2 * model.cfg.n_layers)
    assert model.original_model.config._attn_implementation == "eager"
    whole = tiny.plain(input_ids=torch.cat([prompt_tokens.expand(3, -1), rows], 1)).logits[:, 40:]
    assert torch.allclose(got, whole, atol=1e-4)
    assert torch.allclose(one, whole[:, :1], atol=1e-4)
    n_calls = len(calls)
    runner.logits(rows, prompt=prompt)  # the hooked attention computes its own
    assert len(calls) == n_calls


@pytest.mark.parametrize("fault", ["keys", "values", "wrong"])
@torch.inference_mode()
def test_models_that_cannot_share_a_prompt_in_place_are_found_out(tiny_folders, monkeypatch, fault):
    from transformers import AttentionInterface

    from dps_lens.model.fast import shared

    shared._register()
    attend = AttentionInterface._global_mapping[shared._NAME]

    def faulty(module, query, key, value, *args, **kwargs):
        if fault == "keys":
            key = key + 0  # a new tensor, as of a model that works on its keys after the cache
        elif fault == "values":
            value = value + 0
        out, weights = attend(module, query, key, value, *args, **kwargs)
        return (1.1 * out if fault == "wrong" else out), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, shared._NAME, faulty)
    model = dps.load_model(str(tiny_folders["llama"]))
    runner, whole = runner_of(model), model(TOKENS)
    with native_attention(model):
        prompt = runner.prefill(TOKENS[:, :20])
        assert torch.allclose(runner.logits(TOKENS[:, 20:], prompt=prompt), whole[:, 20:], atol=1e-4)
    assert not model._dps_lens_trials["shares"]


@torch.inference_mode()
def test_a_shared_prompt_in_bfloat16_is_as_exact_as_the_kernels(tiny_folders):
    exact = dps.load_model(str(tiny_folders["llama"]))(TOKENS)[:, 20:]
    model = dps.load_model(str(tiny_folders["llama"]), dtype="bfloat16")
    runner = runner_of(model)
    with native_attention(model):
        shared = runner.logits(TOKENS[:, 20:], prompt=runner.prefill(TOKENS[:, :20]))
        whole = runner.logits(TOKENS)[:, 20:]
    assert model._dps_lens_trials["shares"]
    assert (shared.float() - exact).norm() < 1.2 * (whole.float() - exact).norm()


@torch.inference_mode()
def test_left_padded_rows_equal_single_rows(tiny):
    runner = runner_of(tiny.hooked)
    short = TOKENS[:, :13]
    padded = torch.cat([torch.full((1, 7), 3), short], 1)
    tokens, mask = torch.cat([TOKENS[:, :20], padded]), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    with native_attention(tiny.hooked):
        prompt = runner.prefill(tokens[:, :-1], mask[:, :-1])
        got = runner.step(tokens[:, -1:], runner.start_decoding(prompt, torch.arange(2)), mask)
    assert torch.allclose(got[0], tiny.plain(input_ids=TOKENS[:, :20]).logits[0, -1], atol=1e-4)
    assert torch.allclose(got[1], tiny.plain(input_ids=short).logits[0, -1], atol=1e-4)


def test_dtype_and_bfloat16(tiny_folders, probe, short):
    model = dps.load_model(str(tiny_folders["llama"]), dtype="bfloat16")
    assert describe_model(model)["dtype"] == "bfloat16"
    scores = score_pcs(model, probe[:1], max_examples=1, ablation="mean", prompt_config=short)
    assert scores.values.dtype == torch.float32
    exact = score_pcs(
        dps.load_model(str(tiny_folders["llama"])), probe[:1], max_examples=1, ablation="mean", prompt_config=short
    )
    assert float((scores.values - exact.values).abs().max()) < 0.1


def test_load_errors_name_the_fix(tmp_path, tiny_folders, monkeypatch):
    with pytest.raises(ModelLoadError, match="Give a Hugging Face id, a folder"):
        dps.load_model("nobody/nothing")
    with pytest.raises(ModelLoadError, match="there is no file"):
        dps.load_model(str(tmp_path / "weights.gguf"))
    with pytest.raises(ModelLoadError, match="dtype 'float8' is unknown"):
        dps.load_model(str(tiny_folders["llama"]), dtype="float8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelLoadError, match="cannot be read as GGUF"):
        dps.load_model(str(broken))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    torn = tmp_path / "torn"
    shutil.copytree(tiny_folders["llama"], torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="cannot load"):
        dps.load_model(str(torn))


@pytest.mark.real
def test_embedded_model_is_converted_once(real):
    from dps_lens.model.load import _resolve

    folder = _resolve("smollm2-135m", torch.float32)
    assert folder == _resolve("smollm2-135m", torch.float32)
    assert (real.cfg.n_layers, real.cfg.n_heads, real.cfg.d_head) == (30, 9, 64)
    assert dps.check_model(real)["parity"] < 1e-3


def test_fingerprint_follows_the_weights(tiny_folders):
    one = dps.load_model(str(tiny_folders["llama"]))
    same = describe_model(dps.load_model(str(tiny_folders["llama"])))
    assert describe_model(one) == same
    with torch.no_grad():
        one.blocks[0].attn.o.original_component.weight[0, 0] += 1
    assert describe_model(one)["weights"] != same["weights"]


def test_models_without_a_tokenizer_template_use_plain_text(tmp_path, probe):
    tokenizer = make_tokenizer("byte", chat=False)
    make_hf_model("gpt2", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = dps.load_model(str(tmp_path))
    prompt = dps.build_prompt(model, probe[0].examples[0])
    assert prompt.text.endswith("\n\nAnswer:")
    assert int(prompt.tokens[0]) == tokenizer.bos_token_id


def test_the_bridge_loads_models_that_are_spread_over_devices(tiny_folders, llama):
    spread = dps.load_model(str(tiny_folders["llama"]), device_map="cpu")
    with torch.no_grad():
        assert torch.allclose(spread(TOKENS), llama.hooked(TOKENS), atol=1e-6)
    assert describe_model(spread)["weights"] == describe_model(llama.hooked)["weights"]
