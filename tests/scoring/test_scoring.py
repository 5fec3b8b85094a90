"""PCS against an oracle that shares no code with it."""

import pytest
import torch
from conftest import ARCHITECTURES
from oracles import ablated_nll, edited_positions, nll, uniform_z, z_of
from pcs import score_pcs

import dps_lens as dps
from dps_lens.data import build_prompt
from dps_lens.errors import InterventionError, PromptError, RunError, ScoreError
from dps_lens.model.runners import runner_of
from dps_lens.scoring import CleanRun, clean_run, single_heads
from dps_lens.scoring.attribution import attribute

TOLERANCE = 1e-4  # nats per token, float32


@pytest.fixture(scope="module")
def users(probe):
    return probe[:2]


def prompts_of(model, users, config):
    for user in users:
        example = user.discovery_examples()[-1]
        yield build_prompt(model, example, "own", config=config), build_prompt(model, example, "none", config=config)


@pytest.mark.parametrize("positions", ["response", "all", "profile"])
@pytest.mark.parametrize("ablation", ["zero", "mean", "uniform"])
def test_pcs_equals_plain_hugging_face(tiny, users, short, ablation, positions):
    model, cfg = tiny.hooked, tiny.hooked.cfg
    scores = score_pcs(model, users, ablation=ablation, positions=positions, max_examples=1, prompt_config=short)
    pairs = list(prompts_of(model, users, short))
    checked = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads) if (layer + head) % 2]
    for row, pair in enumerate(pairs):
        for name, prompt in zip(("own", "no_profile"), pair, strict=True):
            clean = nll(tiny.plain, prompt)
            assert abs(float(scores.nll[name][row]) - clean) < TOLERANCE
            for layer, head in checked:
                columns = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
                handle, new = None, 0.0
                if ablation == "mean":
                    which = ("own", "no_profile").index(name)
                    if positions == "profile" and name == "no_profile":
                        continue
                    z = [
                        z_of(tiny.plain, p[which], layer)[edited_positions(p[which], positions), columns] for p in pairs
                    ]
                    new = torch.cat(z).mean(0)
                elif ablation == "uniform":
                    new, handle = uniform_z(tiny.plain, layer, head, cfg.d_head, cfg.n_heads)
                expected = ablated_nll(tiny.plain, prompt, layer, head, cfg.d_head, positions, new) - clean
                if handle:
                    handle.remove()
                got = float(scores.components[name][row, layer, head])
                assert got == pytest.approx(expected, abs=TOLERANCE), (name, layer, head)
    if positions == "profile":
        assert not scores.components["no_profile"].any()
    assert scores.values.abs().max() > 10 * TOLERANCE, "the ablations change nothing; the comparison shows nothing"


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_patch_equals_plain_hugging_face(tiny, users, short, direction):
    model, cfg = tiny.hooked, tiny.hooked.cfg
    scores = score_pcs(model, users, ablation=dps.Patch(direction=direction), max_examples=1, prompt_config=short)
    for row, (own, none) in enumerate(prompts_of(model, users, short)):
        base, source = (own, none) if direction == "noising" else (none, own)
        sign = 1 if direction == "noising" else -1
        for layer, head in [(0, 1), (1, 2), (2, 3)]:
            columns = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
            new = z_of(tiny.plain, source, layer)[edited_positions(source, "response"), columns]
            expected = ablated_nll(tiny.plain, base, layer, head, cfg.d_head, "response", new) - nll(tiny.plain, base)
            assert float(scores.values[row, layer, head]) == pytest.approx(sign * expected, abs=TOLERANCE)
    assert scores.values.abs().max() > 10 * TOLERANCE


def test_patch_needs_equal_lengths_outside_the_response(llama, users, short):
    with pytest.raises(PromptError, match="equal token length"):
        score_pcs(llama.hooked, users, ablation="patch", positions="all", max_examples=1, prompt_config=short)


def test_patch_from_itself_is_zero_everywhere(llama, users, short):
    from dps_lens.scoring.sweep import aligned_z

    prompt = build_prompt(llama.hooked, users[0].discovery_examples()[-1], config=short)
    for positions in ("response", "profile", "all"):
        values, where = aligned_z(llama.hooked, prompt, prompt, positions)
        branches = CleanRun(
            runner_of(llama.hooked), prompt, ablation=dps.Patch(z=values), positions=positions, where=where
        )
        masks = single_heads(llama.hooked.cfg.n_layers, llama.hooked.cfg.n_heads)
        patched = branches.ablated(masks)
        assert float((patched - branches.nll).abs().max()) < 1e-5


def test_patch_at_all_positions_equals_plain_hugging_face(llama, users, short):
    """Two prompts of equal length: the same profile with two words changed."""
    from dataclasses import replace

    from dps_lens.scoring.sweep import aligned_z

    model, cfg = llama.hooked, llama.hooked.cfg
    base = build_prompt(model, users[0].discovery_examples()[-1], config=short)
    tokens = base.tokens.clone()
    start, stop = base.spans["profile"]
    tokens[start + 2 : stop - 2 : 3] = 40
    tokens[base.spans["task"][0] + 1] = 41
    source = replace(base, tokens=tokens)
    same = base.tokens == source.tokens
    same[start:stop] = True
    values, where = aligned_z(model, base, source, "all")
    branches = CleanRun(runner_of(model), base, ablation=dps.Patch(z=values), positions="all", where=where)
    got = branches.ablated(single_heads(cfg.n_layers, cfg.n_heads)).reshape(cfg.n_layers, cfg.n_heads)
    from oracles import columns_replaced

    for layer, head in [(0, 0), (1, 3), (2, 1)]:
        new = z_of(llama.plain, source, layer)[:, head * cfg.d_head : (head + 1) * cfg.d_head][same]
        with columns_replaced(llama.plain, layer, head, cfg.d_head, same, new):
            assert float(got[layer, head]) == pytest.approx(nll(llama.plain, base), abs=TOLERANCE)


def test_profile_specific_score_is_the_gain_that_an_ablation_takes(llama, users, short):
    model, cfg = llama.hooked, llama.hooked.cfg
    scores = score_pcs(model, users, max_examples=1, prompt_config=short)
    for row, (own, none) in enumerate(prompts_of(model, users, short)):
        gain = nll(llama.plain, none) - nll(llama.plain, own)
        for layer, head in [(0, 0), (2, 2)]:
            ablated = [ablated_nll(llama.plain, p, layer, head, cfg.d_head, "response", 0.0) for p in (none, own)]
            taken = gain - (ablated[0] - ablated[1])
            assert float(scores.values[row, layer, head]) == pytest.approx(taken, abs=TOLERANCE)


def test_other_user_contrast_averages_seeded_donors(llama, probe, short):
    model = llama.hooked
    options = {"max_examples": 1, "prompt_config": short, "against": "other_user"}
    scores = score_pcs(model, probe[:4], seed=3, score_config=dps.ScoreConfig(n_donors=2), **options)
    again = score_pcs(model, probe[:4], seed=3, score_config=dps.ScoreConfig(n_donors=2), **options)
    other = score_pcs(model, probe[:4], seed=4, score_config=dps.ScoreConfig(n_donors=2), **options)
    assert torch.equal(scores.values, again.values)
    assert not torch.equal(scores.components["other_user"], other.components["other_user"])
    assert torch.equal(scores.components["own"], other.components["own"])
    assert torch.allclose(scores.values, scores.components["own"] - scores.components["other_user"])


@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
def test_batches_do_not_change_scores(llama, users, short, batch_size):
    prompt = build_prompt(llama.hooked, users[0].discovery_examples()[-1], config=short)
    masks = single_heads(3, 4)
    sets = torch.stack(
        [masks[[0, 5]].any(0), masks[[11]].any(0), torch.zeros(3, 4, dtype=torch.bool), masks[:8].any(0)]
    )
    runner = runner_of(llama.hooked)
    got = CleanRun(runner, prompt, batch_size=batch_size).ablated(torch.cat([sets, masks]))
    for row, mask in enumerate(torch.cat([sets, masks])):
        with dps.ablate(llama.hooked, mask, positions="response", prompt=prompt), torch.no_grad():
            start, stop = prompt.spans["response"]
            logits = llama.hooked(prompt.tokens[None])[0, start - 1 : stop - 1].double()
        expected = float(torch.nn.functional.cross_entropy(logits, prompt.tokens[start:stop]))
        assert float(got[row]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.real
@pytest.mark.parametrize(
    "ablation", ["patch", *(pytest.param(name, marks=pytest.mark.full) for name in ("zero", "mean", "uniform"))]
)
def test_embedded_model_equals_plain_hugging_face(real, users, ablation):
    from dps_lens.model.check import _plain_model

    config = dps.PromptConfig(items=2, profile_tokens=80, task_tokens=60, response_tokens=8)
    plain, cfg = _plain_model(real), real.cfg
    prompt = build_prompt(real, users[1].discovery_examples()[-1], config=config)
    chosen = [(0, 0), (1, 5), (14, 3), (29, 8)]
    rows = [layer * cfg.n_heads + head for layer, head in chosen]
    means = torch.randn(cfg.n_layers, cfg.n_heads, cfg.d_head, generator=torch.Generator().manual_seed(0))
    other = build_prompt(real, users[1].discovery_examples()[-1], "none", config=config)
    for positions in ("response",) if ablation == "patch" else ("response", "all", "profile"):
        patched = dps.Patch(z=dps.record_z(real, other)[:, : len(other.response_tokens)])
        made = {"mean": dps.Mean(z=means), "patch": patched}.get(ablation, ablation)
        branches = CleanRun(runner_of(real), prompt, ablation=made, positions=positions)
        got = branches.ablated(single_heads(cfg.n_layers, cfg.n_heads)[rows])
        assert abs(branches.nll - nll(plain, prompt)) < TOLERANCE
        for value, (layer, head) in zip(got, chosen, strict=True):
            columns, handle, new = slice(head * cfg.d_head, (head + 1) * cfg.d_head), None, 0.0
            if ablation == "mean":
                new = means[layer, head]
            elif ablation == "patch":
                new = z_of(plain, other, layer)[edited_positions(other, "response"), columns]
            elif ablation == "uniform":
                new, handle = uniform_z(plain, layer, head, cfg.d_head, cfg.n_heads)
            expected = ablated_nll(plain, prompt, layer, head, cfg.d_head, positions, new)
            if handle:
                handle.remove()
            assert float(value) == pytest.approx(expected, abs=TOLERANCE)


def test_unknown_settings_are_refused(llama, users, unchecked):
    for options in (
        {"positions": "first"},
        {"against": "noise"},
        {"method": "guess"},
        {"ablation": "patch", "against": None},
    ):
        with pytest.raises(ScoreError):
            score_pcs(llama.hooked, users[:1], max_examples=1, **options)
    with pytest.raises(InterventionError, match="use one of zero, mean, patch, uniform"):
        score_pcs(llama.hooked, users[:1], ablation="nothing")
    with pytest.raises(ScoreError, match="at least two users"):
        score_pcs(llama.hooked, users[:1], against="other_user")
    for batch_size in (0, 2.0, True, "all"):
        with pytest.raises(RunError, match="batch_size .* is not a whole number from 1 up; or 'auto'"):
            dps.RunConfig(batch_size=batch_size)
    for settings in ({"n_donors": 0}, {"exact_layers": True}, {"confirm": float("nan")}, {"confirm": 1.5}):
        with pytest.raises(ScoreError, match=f"ScoreConfig: {next(iter(settings))}"):
            dps.ScoreConfig(**settings)


def test_nan_in_weights_is_an_error(tiny_folders, users, short):
    model = dps.load_model(str(tiny_folders["llama"]))
    with torch.no_grad():
        model.blocks[1].attn.o.original_component.weight[0, 0] = float("nan")
    with pytest.raises(ScoreError, match="check_model"):
        score_pcs(model, users, max_examples=1, prompt_config=short)
    with pytest.raises(dps.DPSLensError, match="NaN"):
        dps.check_model(model)


def test_every_architecture_is_covered():
    assert {"llama", "gpt2", "gpt_neox", "qwen2", "gemma3"} <= set(ARCHITECTURES)


@pytest.mark.parametrize("positions", ["response", "all"])
def test_residuals_that_do_not_fit_are_computed_again(tiny, users, short, positions, monkeypatch):
    prompt = build_prompt(tiny.hooked, users[0].discovery_examples()[-1], config=short)
    runner, masks = runner_of(tiny.hooked), single_heads(3, 4)
    whole = CleanRun(runner, prompt, positions=positions)
    monkeypatch.setattr(clean_run, "_RESIDUAL_BYTES", 1)
    spaced = CleanRun(runner, prompt, positions=positions)
    assert (sorted(whole.residuals), sorted(spaced.residuals)) == ([0, 1, 2], [0])
    assert torch.allclose(spaced.ablated(masks), whole.ablated(masks), atol=1e-6)
    assert torch.allclose(attribute(spaced), attribute(whole), atol=1e-6)


def test_running_out_of_memory_halves_the_batch(llama, users, short, monkeypatch):
    prompt = build_prompt(llama.hooked, users[0].discovery_examples()[-1], config=short)
    runner, masks = runner_of(llama.hooked), single_heads(3, 4)
    expected = CleanRun(runner, prompt).ablated(masks)
    real, sizes = CleanRun._run, []

    def run(self, masks, *rest):
        sizes.append(len(masks))
        if len(masks) > 3:
            raise torch.OutOfMemoryError("planted")
        return real(self, masks, *rest)

    monkeypatch.setattr(CleanRun, "_run", run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    got = CleanRun(runner, prompt, batch_size=12).ablated(masks)
    assert sizes == [12, 6, 3, 3, 3, 3]
    assert torch.allclose(got, expected, atol=1e-6)
    monkeypatch.setattr(CleanRun, "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")))
    with pytest.raises(torch.OutOfMemoryError):
        CleanRun(runner, prompt, batch_size=1).ablated(masks)
