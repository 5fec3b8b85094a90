"""The language model of a multimodal checkpoint, against the whole in plain transformers; and nothing is installed."""

import subprocess

import pytest
import torch
import transformers
from conftest import make_tokenizer

import dps_lens as dps
from dps_lens.errors import ModelLoadError
from dps_lens.model import wrap_model

TOKENS = torch.arange(5, 45)[None]
TEXT = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PICTURES = {"image_size": 28, "patch_size": 14}


def gemma3():
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={**TEXT, "sliding_window": 24, "layer_types": layers},
            vision_config={**VISION, **PICTURES},
            mm_tokens_per_image=4,
            bos_token_id=1,
            eos_token_id=3,
            pad_token_id=3,
            image_token_index=599,
            boi_token_index=598,
            eoi_token_index=597,
        )
    )


def llava():
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**VISION, **PICTURES, projection_dim=16),
            image_token_index=599,
        )
    )


@pytest.fixture
def commands(monkeypatch):
    """Commands that were to be run, of which none is."""
    found = []

    def record(command, *args, **kwargs):
        found.append(command)
        raise RuntimeError("not run")

    for name in ("check_call", "check_output", "call", "run", "Popen"):
        monkeypatch.setattr(subprocess, name, record)
    return found


@pytest.fixture(params=[gemma3, llava])
def whole(request, tmp_path):
    torch.manual_seed(0)
    model = request.param().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_the_text_part_is_loaded_and_nothing_installed(whole, commands):
    reference = transformers.AutoModelForImageTextToText.from_pretrained(whole, dtype=torch.float32).eval()
    expected = reference(input_ids=TOKENS).logits
    models = [dps.load_model(str(whole), **options) for options in ({}, {"device_map": "cpu"})]
    models.append(wrap_model(reference, make_tokenizer(), str(whole), device="cpu", dtype=torch.float32))
    for model in models:
        assert torch.allclose(model(TOKENS), expected, atol=1e-4)
        assert not hasattr(model, "vision_encoder")
        assert type(model.original_model).__name__.endswith("ForCausalLM")
    assert max(dps.check_model(models[0]).values()) < 1e-3
    empty = dps.load_model(str(whole), device="meta")
    assert (empty.cfg.n_layers, empty.cfg.n_heads) == (3, 4)
    assert commands == []


def test_a_text_part_that_transformers_does_not_have_alone_is_named(tmp_path, commands):
    config = transformers.Qwen2_5_VLConfig(
        text_config={key: value for key, value in TEXT.items() if key != "head_dim"},
        vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 16},
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="Qwen2_5_VLForConditionalGeneration: .*text part"):
        dps.load_model(str(tmp_path))
    assert commands == []
