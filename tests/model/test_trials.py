"""What a model can do is tried on the bare model, whatever hangs on it."""

import pytest
import torch
from architectures import save_random
from conftest import no_hooks_left

import dps_lens as dps
from dps_lens.errors import ModelCheckError
from dps_lens.model import check_attention_reads, check_attention_writes
from dps_lens.model.runners import runner_of
from dps_lens.model.trials import tried

TOKENS = torch.arange(5, 17)[None]


def test_trials_do_not_see_the_hooks_of_others(tiny_folders):
    model = dps.load_model(str(tiny_folders["llama"]))
    clean = runner_of(model).logits(TOKENS)
    everything = dps.HeadSet([(layer, head) for layer in range(3) for head in range(4)])
    with dps.ablate(model, everything, positions="all"):
        ablated = runner_of(model).logits(TOKENS)
        check_attention_writes("a test", model)
        seen = tried(model, "logits of the bare model", lambda: runner_of(model).logits(TOKENS))
        assert torch.equal(seen, clean)
        assert torch.equal(runner_of(model).logits(TOKENS), ablated), "the hooks are back"
    assert not torch.equal(clean, ablated)
    assert torch.equal(runner_of(model).logits(TOKENS), clean)
    assert no_hooks_left(model)
    assert tried(model, "logits of the bare model", lambda: pytest.fail("tried twice")) is seen


def test_uniform_is_refused_where_scores_are_not_obeyed(tmp_path):
    save_random("GPTJ", tmp_path)
    model = dps.load_model(str(tmp_path))
    check_attention_reads("a test", model)
    with pytest.warns(UserWarning, match="z does not follow what is written at hook_attn_scores"):
        dps.check_model(model)
    heads = dps.HeadSet([(1, 1)])
    with pytest.raises(ModelCheckError, match="use 'zero', 'mean' or 'patch'"):
        dps.generate(model, "Dear diary", heads=heads, rule="decore", max_new_tokens=2)
    with (
        pytest.raises(ModelCheckError, match="hook_attn_scores"),
        dps.ablate(model, heads, ablation="uniform", positions="all"),
    ):
        pass
    assert no_hooks_left(model)


def test_long_prompts_are_checked_where_rotary_factors_change(tmp_path, monkeypatch):
    save_random("Phi3, longrope", tmp_path)
    model = dps.load_model(str(tmp_path))
    assert dps.check_model(model)["long prompt"] < 1e-3
    kept, runner = model.original_model.model.rotary_emb.long_inv_freq, runner_of(model)

    class Short(type(runner)):
        """Keeps keys under other factors than a whole pass has, as a cache does that was filled below the switch."""

        def prefill(self, tokens, mask=None):
            kept.div_(2)
            try:
                return super().prefill(tokens, mask)
            finally:
                kept.mul_(2)

    monkeypatch.setattr("dps_lens.model.check.runner_of", Short)
    with pytest.raises(ModelCheckError, match="long cached prompt"):
        dps.check_model(model)
