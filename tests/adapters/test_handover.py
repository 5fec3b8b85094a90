"""DPS in others' hands: inside the `generate` of transformers, and as a LoRA adapter."""

import json
import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import no_hooks_left
from safetensors.torch import load_file
from transformers import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor

import dps_lens as dps
from dps_lens.adapters.lora import export_lora
from dps_lens.adapters.processor import logits_processor
from dps_lens.data import build_prompt
from dps_lens.errors import HeadError, InterventionError, SteeringError
from dps_lens.heads import HeadSet
from dps_lens.model import native_attention

HEADS = HeadSet.parse("L0H1,L0H3,L2H2")
NEW = 8


@pytest.fixture(scope="module")
def prompts_of(probe):
    def build(model):
        configs = [dps.PromptConfig(items=n, profile_tokens=p, task_tokens=20) for n, p in ((3, 60), (2, 30))]
        return [
            build_prompt(model, user.examples[0], config=config)
            for user, config in zip((probe[0], probe[5]), configs, strict=True)
        ]

    return build


def written(model, ids, steering, new=NEW, **options):
    """What the `generate` of transformers adds to each row, up to its end token."""
    out = model.original_model.generate(
        ids, logits_processor=LogitsProcessorList([steering]), max_new_tokens=new, **{"do_sample": False, **options}
    )
    rows = [row[ids.shape[1] :].tolist() for row in out]
    return [row[: row.index(3) + 1] if 3 in row else row for row in rows]


def left_padded(prompts, pad=3):
    longest = max(len(prompt.prompt_tokens) for prompt in prompts)
    gaps = [longest - len(prompt.prompt_tokens) for prompt in prompts]
    ids = [torch.nn.functional.pad(p.prompt_tokens, (gap, 0), value=pad) for p, gap in zip(prompts, gaps, strict=True)]
    return torch.stack(ids), torch.stack([(torch.arange(longest) >= gap).long() for gap in gaps])


class Naive:
    """DPS by definition: the whole masked pass at every step, no cache; response positions from `start` on."""

    def __init__(self, model, gamma, start=None):
        self.model, self.gamma, self.start = model, gamma, start

    def __call__(self, input_ids, scores):
        positions = "all" if self.start is None else "response"
        spans = {"profile": (0, 0), "response": (self.start or 0, self.start or 0)}
        prompt = dps.Prompt(input_ids[0], spans, text="", condition="own", example_id="", user_id="", shown=())
        with dps.ablate(self.model, HEADS, positions=positions, prompt=prompt):
            masked = self.model(input_ids)[:, -1].log_softmax(-1)
        full = scores.log_softmax(-1)
        return ((1 + self.gamma) * full - self.gamma * masked).log_softmax(-1)


@pytest.mark.parametrize("positions", ["response", "all"])
def test_generate_of_transformers_writes_what_dps_generate_writes(tiny, prompts_of, positions):
    model, prompts = tiny.hooked, prompts_of(tiny.hooked)
    out = dps.generate(model, prompts, heads=HEADS, gamma=1.5, positions=positions, max_new_tokens=NEW)
    expected = [tokens.tolist() for tokens in out.tokens]
    alone = logits_processor(model, HEADS, 1.5, positions=positions)
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert written(model, prompt.prompt_tokens[None], alone) == [tokens]
    ids, mask = left_padded(prompts)
    assert not mask.all()
    padded = logits_processor(model, HEADS, 1.5, positions=positions, attention_mask=mask)
    assert written(model, ids, padded, attention_mask=mask) == expected
    plain = dps.generate(model, prompts, heads=HEADS, gamma=0.0, max_new_tokens=NEW)
    assert [tokens.tolist() for tokens in plain.tokens] != expected
    assert no_hooks_left(model)


def test_it_equals_the_guidance_processor_of_transformers_around_the_masked_model(llama, prompts_of):
    model, ids = llama.hooked, prompts_of(llama.hooked)[0].prompt_tokens[None]

    def masked(*args, **kwargs):
        with dps.ablate(model, HEADS, positions="all"):
            return model.original_model(*args, **kwargs)

    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(2.5, masked, unconditional_ids=ids)
    assert written(model, ids, logits_processor(model, HEADS, 1.5, positions="all")) == written(model, ids, guidance)


def test_uniform_masking_and_the_masked_model_itself(llama, prompts_of):
    model, prompt = llama.hooked, prompts_of(llama.hooked)[0]
    for gamma, ablation in ((1.0, "uniform"), (-1.0, "zero")):
        out = dps.generate(
            model,
            prompt,
            heads=HEADS,
            gamma=gamma,
            max_new_tokens=NEW,
            decode_config=dps.DecodeConfig(ablation=ablation),
        )
        steering = logits_processor(model, HEADS, gamma, ablation=ablation)
        assert written(model, prompt.prompt_tokens[None], steering) == [out.tokens[0].tolist()]


def test_native_attention_may_be_on_around_generate(llama, prompts_of):
    model, ids = llama.hooked, prompts_of(llama.hooked)[0].prompt_tokens[None]
    expected = written(model, ids, logits_processor(model, HEADS, 1.5))
    with native_attention(model):
        assert written(model, ids, logits_processor(model, HEADS, 1.5)) == expected
        with pytest.raises(InterventionError, match="uniform"):
            written(model, ids, logits_processor(model, HEADS, 1.5, ablation="uniform"))
    assert model.original_model.config._attn_implementation == "eager"


@pytest.mark.parametrize("positions", ["response", pytest.param("all", marks=pytest.mark.full)])
def test_sampling_and_beams_equal_naive_steering(tiny, prompts_of, positions):
    model, ids = tiny.hooked, prompts_of(tiny.hooked)[0].prompt_tokens[None]
    naive = Naive(model, 0.8, start=ids.shape[1] if positions == "response" else None)
    steering = logits_processor(model, HEADS, 0.8, positions=positions)
    for options in (
        {"do_sample": True, "top_p": 0.9, "temperature": 0.8, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ):
        torch.manual_seed(4)
        expected = written(model, ids, naive, **options)
        torch.manual_seed(4)
        assert written(model, ids, steering, **options) == expected


def test_padded_beams_equal_single_prompts(llama, prompts_of):
    model, prompts = llama.hooked, prompts_of(llama.hooked)
    ids, mask = left_padded(prompts)
    padded = logits_processor(model, HEADS, 0.8, attention_mask=mask)
    together = written(model, ids, padded, attention_mask=mask, num_beams=3)
    alone = [
        written(model, prompt.prompt_tokens[None], logits_processor(model, HEADS, 0.8), num_beams=3)[0]
        for prompt in prompts
    ]
    assert together == alone


def test_scores_are_the_steered_distribution(llama, prompts_of):
    model, prompt = llama.hooked, prompts_of(llama.hooked)[0]
    ids, out = (
        prompt.prompt_tokens[None],
        dps.generate(
            model,
            prompt,
            heads=HEADS,
            gamma=1.5,
            max_new_tokens=1,
            decode_config=dps.DecodeConfig(keep_delta_logits=True),
        ),
    )
    with torch.no_grad():
        full = llama.plain(ids).logits[:, -1]
    scores = logits_processor(model, HEADS, 1.5)(ids, full)
    assert torch.allclose(scores, (full + out.delta_logits[0]).log_softmax(-1), atol=1e-4)
    banned = full.clone()
    banned[:, 7] = -torch.inf
    for gamma in (1.5, -1.0):
        scores = logits_processor(model, HEADS, gamma)(ids, banned)
        assert float(scores[0, 7]) == -torch.inf
        assert float(scores.exp().sum()) == pytest.approx(1, abs=1e-4)


def test_gamma_zero_leaves_scores_alone(llama):
    scores = torch.randn(1, llama.hooked.cfg.d_vocab)
    ids = torch.tensor([[1, 20, 30]])
    assert logits_processor(llama.hooked, HEADS, 0.0)(ids, scores) is scores
    assert logits_processor(llama.hooked, HeadSet(), 2.0)(ids, scores) is scores


@pytest.mark.parametrize("positions", ["response", "all"])
def test_one_processor_serves_one_prompt_after_another(llama, prompts_of, positions):
    model, prompts = llama.hooked, prompts_of(llama.hooked)
    steering = logits_processor(model, HEADS, 1.5, positions=positions)
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[0]):
        fresh = logits_processor(model, HEADS, 1.5, positions=positions)
        ids = prompt.prompt_tokens[None]
        assert written(model, ids, steering) == written(model, ids, fresh)
    assert written(model, prompts[0].prompt_tokens[None].repeat(2, 1), steering) == 2 * written(
        model, prompts[0].prompt_tokens[None], fresh
    )


@pytest.mark.parametrize("positions", ["response", "all"])
def test_a_response_in_pieces_equals_one_at_once(llama, prompts_of, positions):
    model, ids = llama.hooked, prompts_of(llama.hooked)[0].prompt_tokens[None]
    steering = logits_processor(model, HEADS, 1.5, positions=positions)
    first = written(model, ids, steering, new=4)
    longer = torch.cat([ids, torch.tensor(first)], dim=1)
    second = written(model, longer, steering, new=4)
    assert [first[0] + second[0]] == written(model, ids, logits_processor(model, HEADS, 1.5, positions=positions))
    written(model, ids, steering, new=4)
    naive = Naive(model, 1.5, start=ids.shape[1] if positions == "response" else None)
    assert written(model, longer, steering, num_beams=3) == written(model, longer, naive, num_beams=3)
    steering.reset()
    fresh = logits_processor(model, HEADS, 1.5, positions=positions)
    assert written(model, longer, steering) == written(model, longer, fresh)


def test_a_prompt_that_holds_the_one_before(llama, prompts_of):
    model, ids = llama.hooked, prompts_of(llama.hooked)[0].prompt_tokens[None]
    everywhere, response = (logits_processor(model, HEADS, 1.5, positions=p) for p in ("all", "response"))
    for steering in (everywhere, response):
        written(model, ids, steering)
    longer = torch.cat([ids, torch.tensor([[41, 42]])], dim=1)
    fresh = logits_processor(model, HEADS, 1.5, positions="all")
    assert written(model, longer, everywhere) == written(model, longer, fresh)
    with pytest.raises(SteeringError, match=r"reset\(\)"):
        written(model, longer, response)
    turn = torch.cat([ids, torch.arange(40, 40 + 2 * NEW)[None]], dim=1)
    assert written(model, turn, response) == written(model, turn, logits_processor(model, HEADS, 1.5))


def test_assisted_decoding_equals_plain_decoding(llama, tinies, prompts_of):
    model, ids = llama.hooked, prompts_of(llama.hooked)[0].prompt_tokens[None]
    assistant = tinies("qwen2").plain
    expected = written(model, ids, logits_processor(model, HEADS, 1.5, positions="all"))
    steering = logits_processor(model, HEADS, 1.5, positions="all")
    assert written(model, ids, steering, assistant_model=assistant) == expected


def test_nothing_is_left_after_an_exception(llama, prompts_of):
    model, ids = llama.hooked, prompts_of(llama.hooked)[0].prompt_tokens[None]
    expected = written(model, ids, logits_processor(model, HEADS, 1.5))
    with torch.no_grad():
        before = model.original_model(ids).logits
    steering = logits_processor(model, HEADS, 1.5)

    def failing(z, hook):
        if model.hook_dict["blocks.0.attn.hook_z"].fwd_hooks:  # in the masked pass only
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", failing)]):
        written(model, ids, steering)
    assert no_hooks_left(model)
    assert model.original_model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert torch.equal(model.original_model(ids).logits, before)
    assert written(model, ids, steering) == expected


def test_a_step_that_failed_can_be_repeated(llama, prompts_of):
    model, ids = llama.hooked, prompts_of(llama.hooked)[0].prompt_tokens[None]
    scores, longer = torch.zeros(1, model.cfg.d_vocab), torch.cat([ids, ids[:, -1:]], dim=1)
    steering, fresh = (logits_processor(model, HEADS, 1.5, positions="all") for _ in range(2))
    steering(ids, scores)

    def failing(z, hook):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"), model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", failing)]):
        steering(longer, scores)
    assert torch.allclose(steering(longer, scores), fresh(longer, scores), atol=1e-5)


def test_bad_processors_are_named(llama, prompts_of, unchecked):
    model, (ids, mask) = llama.hooked, left_padded(prompts_of(llama.hooked))
    for options, message in (
        ({"positions": "profile"}, "dps.generate"),
        ({"gamma": -1.5}, "not a number from -1 up"),
        ({"gamma": float("nan")}, "not a number from -1 up"),
    ):
        with pytest.raises(SteeringError, match=message):
            logits_processor(model, HEADS, **options)
    with pytest.raises(InterventionError, match="needs the means"):
        logits_processor(model, HEADS, ablation="mean")
    with pytest.raises(HeadError, match="not in this model"):
        logits_processor(model, HeadSet.parse("L9H0"), 1.0)
    with pytest.raises(SteeringError, match="HookedTransformer"):
        logits_processor(SimpleNamespace(cfg=model.cfg), HEADS, 1.0)
    with pytest.raises(SteeringError, match="start with padding"):
        written(model, ids, logits_processor(model, HEADS, 1.0), attention_mask=mask)
    with pytest.raises(SteeringError, match="that generate was given"):
        written(model, ids, logits_processor(model, HEADS, 1.0, attention_mask=mask[:, 1:]), attention_mask=mask)
    padded = logits_processor(model, HEADS, 1.0, attention_mask=mask)
    assert written(model, ids, padded, attention_mask=mask) == written(model, ids, padded, attention_mask=mask)
    with pytest.raises(SteeringError, match="each padded batch"):
        written(model, ids.flip(0), padded, attention_mask=mask.flip(0))
    options = {"inputs_embeds": torch.randn(1, 5, 32), "logits_processor": [logits_processor(model, HEADS, 1.0)]}
    with pytest.raises(SteeringError, match="inputs_embeds"):
        model.original_model.generate(**options, max_new_tokens=2)


@torch.no_grad()
def test_the_adapter_is_the_masked_model(tiny, tmp_path, prompts_of):
    peft = pytest.importorskip("peft", reason="the dev extra installs peft")
    prompts = [prompt.prompt_tokens[None] for prompt in prompts_of(tiny.hooked)]
    with dps.ablate(tiny.hooked, HEADS, positions="all"):
        expected = [tiny.hooked(ids) for ids in prompts]
    path = export_lora(tiny.hooked, HEADS, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of peft: keys or modules that do not fit
        masked = peft.PeftModel.from_pretrained(deepcopy(tiny.plain), path).eval()
    for ids, logits in zip(prompts, expected, strict=True):
        assert float((masked(ids).logits - logits).abs().max()) < 1e-4
        assert float((tiny.plain(ids).logits - logits).abs().max()) > 0.01
    merged = masked.merge_and_unload()
    assert float((merged(prompts[0]).logits - expected[0]).abs().max()) < 1e-4


@torch.no_grad()
def test_an_adapter_puts_a_mean_in_the_place_of_z(tiny, tmp_path, prompts_of):
    peft = pytest.importorskip("peft", reason="the dev extra installs peft")
    cfg = tiny.hooked.cfg
    z = torch.randn(cfg.n_layers, cfg.n_heads, cfg.d_head, generator=torch.Generator().manual_seed(5))
    path = export_lora(tiny.hooked, HEADS, tmp_path / "adapter", ablation=dps.Mean(z=z))
    masked = peft.PeftModel.from_pretrained(deepcopy(tiny.plain), path).eval()
    for prompt in prompts_of(tiny.hooked):
        ids = prompt.prompt_tokens[None]
        with dps.ablate(tiny.hooked, HEADS, ablation=dps.Mean(z=z), positions="all"):
            expected = tiny.hooked(ids)
        assert float((masked(ids).logits - expected).abs().max()) < 1e-4
        with dps.ablate(tiny.hooked, HEADS, positions="all"):
            assert float((tiny.hooked(ids) - expected).abs().max()) > 0.01, "a mean is not zero"


def test_adapter_files(tiny, tmp_path):
    path = export_lora(tiny.hooked, HEADS, tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2 * tiny.hooked.cfg.d_head
    assert config["base_model_name_or_path"] == tiny.folder
    modules = dict(tiny.plain.named_modules())
    assert len(config["target_modules"]) == 2
    assert all(name in modules for name in config["target_modules"])
    tensors = load_file(path / "adapter_model.safetensors")
    assert {name.split(".lora_")[0] for name in tensors} == {f"base_model.model.{n}" for n in config["target_modules"]}
    for name in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        weight = modules[name].weight if not config["fan_in_fan_out"] else modules[name].weight.T
        layer = int(name.split(".")[2])
        masked = HEADS.mask(tiny.hooked.cfg)[layer].repeat_interleave(tiny.hooked.cfg.d_head)
        assert torch.equal(weight + b @ a, torch.where(masked, 0.0, weight))


def test_a_second_export_replaces_the_first(llama, tmp_path):
    export_lora(llama.hooked, HEADS, tmp_path)
    export_lora(llama.hooked, HeadSet.parse("L1H0"), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [
        "model.layers.1.self_attn.o_proj"
    ]
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2


def test_bad_exports_are_named(tiny_folders, tmp_path, monkeypatch):
    # A model of its own: its weights are changed.
    model, path = dps.load_model(str(tiny_folders["llama"])), tmp_path / "adapter"
    with pytest.raises(SteeringError, match="empty"):
        export_lora(model, HeadSet(), path)
    with pytest.raises(SteeringError, match="puts a constant in the place of z, which 'uniform' is not"):
        export_lora(model, HEADS, path, ablation="uniform")
    with pytest.raises(InterventionError, match="needs the means"):
        export_lora(model, HEADS, path, ablation="mean")
    with pytest.raises(SteeringError, match="rank 16 = d_head 8 × 2 heads in layer 0 .* at most 1 heads"):
        export_lora(model, HEADS, path, max_rank=12)
    with pytest.raises(HeadError, match="not in this model"):
        export_lora(model, HeadSet.parse("L9H0"), path)
    with pytest.raises(SteeringError, match="HookedTransformer"):
        export_lora(SimpleNamespace(cfg=model.cfg), HEADS, path)
    projection = model.blocks[2].attn.o.original_component
    monkeypatch.setattr(projection, "weight", torch.nn.Parameter(projection.weight.to(torch.float8_e4m3fn)))
    with pytest.raises(SteeringError, match="layer 2 .* quantised"):
        export_lora(model, HEADS, path)
    monkeypatch.undo()
    monkeypatch.setattr("dps_lens.adapters.lora.plain_modules", lambda module: [])
    with pytest.raises(SteeringError, match="layer 0 is made by the bridge"):
        export_lora(model, HEADS, path)
    monkeypatch.undo()
    monkeypatch.setattr(model, "_weights_processed", True)
    with pytest.raises(SteeringError, match="enable_compatibility_mode"):
        export_lora(model, HEADS, path)
    assert not path.exists()
