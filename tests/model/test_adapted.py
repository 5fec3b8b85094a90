"""Adapters of PEFT: merged exactly, or refused by what cannot be merged."""

import json
import sys

import peft
import pytest
import torch
import transformers
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file

import dps_lens as dps
from dps_lens.adapters import export_lora
from dps_lens.errors import ModelLoadError
from dps_lens.model import describe_model, hf_model_of

TOKENS = torch.arange(5, 35)[None]
HEADS = dps.HeadSet([(0, 1), (2, 3)])
LORA = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", "init_lora_weights": False}


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS) if hasattr(model, "hook_dict") else model(input_ids=TOKENS).logits


def make_adapter(base, config, folder):
    """An adapter with random weights, as PEFT writes it."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(plain(base), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name or "modules_to_save" in name or "ia3" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | {"base_model_name_or_path": str(base)}))
    return folder


KINDS = {
    "attention": peft.LoraConfig(**LORA, target_modules=["q_proj", "v_proj", "o_proj"]),
    "dora": peft.LoraConfig(**LORA, target_modules=["o_proj", "down_proj"], use_dora=True),
    "ranks": peft.LoraConfig(
        **LORA,
        target_modules=["o_proj", "k_proj"],
        rank_pattern={"layers.1.self_attn.o_proj": 2},
        alpha_pattern={"k_proj": 3},
        use_rslora=True,
    ),
    "embeddings": peft.LoraConfig(**LORA, target_modules=["o_proj", "embed_tokens"]),
    "modules_to_save": peft.LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["norm"]),
    "ia3": peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "loha": peft.LoHaConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM", init_weights=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_merged_as_peft_merges_it(llama, tmp_path, kind):
    folder = make_adapter(llama.folder, KINDS[kind], tmp_path / "mine")
    merged = peft.PeftModel.from_pretrained(plain(llama.folder), folder).merge_and_unload().eval()
    assert (logits(merged) - logits(llama.plain)).abs().max() > 0.01
    model = dps.load_model(str(folder))
    assert torch.allclose(logits(model), logits(merged), atol=1e-4)
    assert max(dps.check_model(model, reference=merged).values()) < 1e-3
    described = describe_model(model)
    assert described["name"].endswith("+mine")
    assert described["weights"] != describe_model(llama.hooked)["weights"]


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"device_map": "cpu"}])
def test_options_reach_the_base_of_an_adapter(llama, tmp_path, options):
    folder = make_adapter(llama.folder, KINDS["attention"], tmp_path / "mine")
    merged = peft.PeftModel.from_pretrained(plain(llama.folder), folder).merge_and_unload().eval()
    model = dps.load_model(str(folder), **options)
    exact = "device_map" in options
    assert hf_model_of(model).dtype == (torch.float32 if exact else torch.bfloat16)
    error = (logits(model).float() - logits(merged)).norm() / logits(merged).norm()
    assert error < (1e-5 if exact else 0.03)


def test_the_tokenizer_is_the_adapters_own_or_that_of_its_base(llama, tmp_path):
    folder = make_adapter(llama.folder, KINDS["attention"], tmp_path / "mine")
    assert dps.load_model(str(folder)).tokenizer.chat_template == llama.hooked.tokenizer.chat_template
    make_tokenizer(chat=False).save_pretrained(folder)
    assert dps.load_model(str(folder)).tokenizer.chat_template is None
    empty = dps.load_model(str(folder), device="meta")
    assert (empty.cfg.n_layers, empty.tokenizer.chat_template) == (3, None)


def test_an_exported_mask_loads_and_names_what_it_is_of(llama, tmp_path):
    first = make_adapter(llama.folder, KINDS["attention"], tmp_path / "first")
    model = dps.load_model(str(first))
    with torch.no_grad(), dps.ablate(model, HEADS, ablation="zero", positions="all"):
        expected = model(TOKENS)
    second = export_lora(model, HEADS, tmp_path / "second")
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(first)
    masked = dps.load_model(str(second))
    assert torch.allclose(logits(masked), expected, atol=1e-4)
    assert describe_model(masked)["name"].endswith("+first+second")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "is PROMPT_TUNING, which adds to a model's",
        ),
        (
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "is PREFIX_TUNING, which adds to a model's",
        ),
        (peft.LoraConfig(**LORA, target_modules=["o_proj"], lora_bias=True), r"\(LORA\) cannot be merged.*bias"),
    ],
)
def test_what_cannot_be_merged_is_named(llama, tmp_path, config, said):
    folder = make_adapter(llama.folder, config, tmp_path / "mine")
    with pytest.raises(ModelLoadError, match=said) as error:
        dps.load_model(str(folder))
    assert "\n" not in str(error.value)


def change(folder, key, value):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {key: value}))


def test_adapters_that_do_not_fit_are_named(llama, tmp_path, monkeypatch):
    folder = make_adapter(llama.folder, KINDS["attention"], tmp_path / "mine")
    weights = load_file(folder / "adapter_model.safetensors")
    gone = next(name for name in weights if "layers.1" in name and "o_proj.lora_B" in name)
    save_file({name: weight for name, weight in weights.items() if name != gone}, folder / "adapter_model.safetensors")
    with pytest.raises(ModelLoadError, match=r"lacks .*layers\.1\.self_attn\.o_proj\.lora_B"):
        dps.load_model(str(folder))
    save_file(weights, folder / "adapter_model.safetensors")
    change(folder, "target_modules", ["q_proj", "v_proj"])
    with pytest.raises(ModelLoadError, match=r"adds .*o_proj"):
        dps.load_model(str(folder))
    change(folder, "base_model_name_or_path", "nobody/nothing")
    with pytest.raises(ModelLoadError, match="mine' changes the model 'nobody/nothing', which cannot be loaded"):
        dps.load_model(str(folder))
    change(folder, "base_model_name_or_path", None)
    with pytest.raises(ModelLoadError, match="does not say which model it changes"):
        dps.load_model(str(folder))


def test_an_adapter_without_peft_names_the_extra(llama, tmp_path, monkeypatch):
    folder = make_adapter(llama.folder, KINDS["attention"], tmp_path / "mine")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelLoadError, match="pip install peft"):
        dps.load_model(str(folder))


def test_a_folder_with_a_model_and_an_adapter_is_ambiguous(llama, tmp_path):
    folder = make_adapter(llama.folder, KINDS["attention"], tmp_path / "mine")
    plain(llama.folder).save_pretrained(folder)
    with pytest.raises(ModelLoadError, match="holds a model and an adapter"):
        dps.load_model(str(folder))
