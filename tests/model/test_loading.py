"""What a checkpoint must hold, what its options reach, what stays of its tokenizer, and which architectures load."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, S
from conftest import make_hf_model, make_tokenizer
from safetensors.torch import load_file, save_file

import dps_lens as dps
from dps_lens.errors import ModelLoadError
from dps_lens.model import describe_model, loader_of, wrap_model

TOKENS = torch.arange(5, 35)[None]
PLACED = pytest.mark.parametrize("placed", [{}, {"device_map": "cpu"}], ids=["one device", "device_map"])


@torch.no_grad()
def logits(model):
    return model(TOKENS) if hasattr(model, "hook_dict") else model(input_ids=TOKENS).logits


def plain(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def untied(tmp_path):
    """A folder whose weights a test may change."""
    folder = tmp_path / "untied"
    config = transformers.LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@PLACED
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.o_proj.weight"), r"not hold model\.layers\.1\.self_attn\.o_proj\.w"),
        (lambda t: t.pop("lm_head.weight"), r"not hold lm_head\.weight"),
        (
            lambda t: [t.pop(name) for name in list(t) if "layers.2." in name],
            r"not hold model\.layers\.2\.input_layernorm\.weight, .* and 5 more",
        ),
        (lambda t: t.update({"model.layers.3.mlp.w": torch.ones(2)}), r"no place for: model\.layers\.3\.mlp\.w"),
        (lambda t: t.update({"lm_head.weight": torch.ones(601, 32)}), r"lm_head\.weight"),
    ],
    ids=["o_proj", "lm_head", "layer", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_named(untied, placed, change, said):
    dps.load_model(str(untied), **placed)
    rewrite(untied, change)
    with pytest.raises(ModelLoadError, match=said) as error:
        dps.load_model(str(untied), **placed)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_its_language_model_head_is_refused(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"not hold lm_head\.weight"):
        dps.load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("architecture", "buffer"),
    [("gpt2", "transformer.h.0.attn.masked_bias"), ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq")],
)
def test_buffers_of_older_versions_and_tied_weights_are_fine(tmp_path, architecture, buffer):
    make_hf_model(architecture).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({buffer: torch.ones(4)}))
    assert torch.allclose(logits(dps.load_model(str(tmp_path))), logits(plain(tmp_path)), atol=1e-4)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A cache of the Hub with a repository of two revisions: other weights, and other tokens."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / "models--somebody--two"
    (repository / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate({"main": "a" * 40, "second": "b" * 40}.items()):
        folder = repository / "snapshots" / commit
        make_hf_model("llama", seed=seed).save_pretrained(folder)
        tokenizer = make_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>"]})
        tokenizer.save_pretrained(folder)
        (repository / "refs" / name).write_text(commit)
    return cache


@PLACED
@pytest.mark.parametrize(("revision", "commit"), [(None, "a" * 40), ("second", "b" * 40), ("b" * 40, "b" * 40)])
def test_a_revision_reaches_config_weights_and_tokenizer(hub, placed, revision, commit):
    folder = hub / "models--somebody--two" / "snapshots" / commit
    model = dps.load_model("somebody/two", revision=revision, cache_dir=str(hub), **placed)
    again = loader_of(model)(device=None if placed else "cpu")
    for loaded in (model, again):
        assert torch.allclose(logits(loaded), logits(plain(folder)), atol=1e-4)
        assert loaded.tokenizer.get_added_vocab() == make_added(folder)
    with pytest.raises(ModelLoadError, match="'somebody/two'.*third"):
        dps.load_model("somebody/two", revision="third", cache_dir=str(hub), **placed)


def make_added(folder):
    return transformers.AutoTokenizer.from_pretrained(folder).get_added_vocab()


def test_an_adapter_on_the_hub_says_the_revision_of_its_base(hub, tmp_path):
    base = hub / "models--somebody--two" / "snapshots" / ("b" * 40)
    adapted = peft.get_peft_model(
        plain(base), peft.LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    repository = shutil.copytree(hub, tmp_path / "hub") / "models--me--mine"
    folder = repository / "snapshots" / ("c" * 40)
    adapted.save_pretrained(folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "best").write_text("c" * 40)
    written = json.loads((folder / "adapter_config.json").read_text())
    written |= {"base_model_name_or_path": "somebody/two", "revision": "second"}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    model = dps.load_model("me/mine", revision="best", cache_dir=str(tmp_path / "hub"))
    assert torch.allclose(logits(model), logits(adapted), atol=1e-4)
    assert model.tokenizer.get_added_vocab() == make_added(base)
    assert describe_model(model)["name"] == "two+mine"
    exported = dps.export_lora(model, dps.HeadSet([(0, 1)]), tmp_path / "mask")
    written = json.loads((exported / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("me/mine", "best")


def test_workers_place_weights_as_the_options_say(tiny_folders, llama):
    empty = dps.load_model(str(tiny_folders["llama"]), device="meta", device_map={"": "cpu"})
    on_worker = dps.RayEngine(gpus=1)._loader(empty)()
    assert torch.allclose(logits(on_worker), logits(llama.plain), atol=1e-4)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def _init_weights(self, module):
        for parameter in module.parameters(recurse=False):
            parameter.data.normal_()
"""


@PLACED
def test_code_of_a_checkpoint_is_run_when_it_is_trusted(tmp_path, monkeypatch, placed):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "own"
    reference = make_hf_model("llama")
    reference.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "own_code.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own-llama", "auto_map": auto}))
    with pytest.raises(ModelLoadError, match="trust_remote_code"):
        dps.load_model(str(folder), **placed)
    model = dps.load_model(str(folder), trust_remote_code=True, **placed)
    assert type(model.original_model).__name__ == "OwnForCausalLM"
    assert torch.allclose(logits(model), logits(reference), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_mapp": "auto"}, r"no option 'device_mapp'; did you mean 'device_map'\?"),
        ({"attn_implementation": "sdpa"}, "no option 'attn_implementation'; the hooks need eager"),
        ({"checkpoint_value": 1000}, "give the training step as revision="),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory need device_map="),
        ({"device_map": "auto", "n_devices": 2}, "give one"),
        ({"device_map": "auto", "device": "cpu"}, "device='cpu' and device_map= both"),
        ({"revision": "second"}, "revision='second' names a version on the Hub"),
        (
            {"hf_config_overrides": {"rms_norm_epsilon": 1.0}},
            r"'rms_norm_epsilon', which LlamaConfig does not have; did you mean 'rms_norm_eps'\?",
        ),
    ],
)
def test_options_that_cannot_be_honoured_are_named(tiny_folders, options, said):
    with pytest.raises(ModelLoadError, match=said):
        dps.load_model(str(tiny_folders["llama"]), **options)


def test_fields_of_the_config_are_set(tiny_folders):
    model = dps.load_model(str(tiny_folders["llama"]), n_ctx=512, hf_config_overrides={"rms_norm_eps": 0.5})
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folders["llama"], dtype=torch.float32, rms_norm_eps=0.5
    )
    assert torch.allclose(logits(model), logits(reference.eval()), atol=1e-4)
    assert model.cfg.n_ctx == 512


def unstarted(**special):
    """A tokenizer without a start token, as those of Qwen and OLMo."""
    found = make_tokenizer(chat=False)
    inner = found.backend_tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


@PLACED
@pytest.mark.parametrize("special", [{"eos_token": "<|im_end|>"}, {}], ids=["end", "neither"])
def test_a_tokenizer_without_a_start_token_gets_none(tmp_path, placed, special):
    make_hf_model("llama").save_pretrained(tmp_path)
    unstarted(**special).save_pretrained(tmp_path)
    raw = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = dps.load_model(str(tmp_path), **placed)
    ids = raw("Dear diary")["input_ids"]
    for name in ("bos_token", "eos_token", "padding_side", "add_bos_token"):
        assert getattr(model.tokenizer, name, None) == getattr(raw, name, None)
    assert len(model.tokenizer) == len(raw)
    assert model.tokenizer.pad_token == special.get("eos_token", "<unk>")
    assert model.to_tokens("Dear diary").tolist() == [ids]
    assert model.to_tokens("Dear diary", prepend_bos=True).tolist() == [ids]
    written = model.generate("Dear diary", max_new_tokens=4, do_sample=False, return_type="tokens", verbose=False)
    expected = plain(tmp_path).generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=4, do_sample=False
    )
    assert written.tolist() == expected.tolist()


def test_a_tokenizer_with_a_start_token_keeps_its_ways(tiny_folders, tmp_path):
    raw = transformers.AutoTokenizer.from_pretrained(tiny_folders["llama"])
    model = dps.load_model(str(tiny_folders["llama"]))
    assert model.tokenizer("Dear diary")["input_ids"] == raw("Dear diary")["input_ids"]
    assert model.to_tokens("Dear diary").tolist() == [[raw.bos_token_id, *raw("Dear diary")["input_ids"]]]
    assert model.to_tokens("Dear diary", prepend_bos=False).tolist() == [raw("Dear diary")["input_ids"]]


def test_wrapping_leaves_the_tokenizer_as_it_is(tmp_path):
    tokenizer = unstarted(eos_token="<|im_end|>")
    model = wrap_model(make_hf_model("llama"), tokenizer, str(tmp_path), device="cpu", dtype=torch.float32)
    assert model.tokenizer is tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|im_end|>", "<|im_end|>")
    assert model.to_tokens("Dear diary").tolist() == [tokenizer("Dear diary")["input_ids"]]


@pytest.mark.parametrize(
    ("config", "auto", "options", "said"),
    [
        (
            "HeliumConfig",
            "CausalLM",
            ARCHITECTURES["Helium"],
            r"no bridge for HeliumForCausalLM \(model type 'helium'\)",
        ),
        ("FalconConfig", "CausalLM", ARCHITECTURES["Falcon, new decoder"], "cannot wrap FalconForC"),
        (
            "Lfm2Config",
            "CausalLM",
            {**S, "layer_types": ["conv", "full_attention", "conv"]},
            r"Lfm2ForCausalLM has no attention heads \(hook_z\) in layers 0, 2 of 3",
        ),
        (
            "DeepseekV3Config",
            "CausalLM",
            ARCHITECTURES["DeepseekV3"],
            "DeepseekV3ForCausalLM has no output for each head: .* of layers 0, 1, 2 reads 24 values, not 4 heads × 4",
        ),
        (
            "MambaConfig",
            "CausalLM",
            {"hidden_size": 32, "num_hidden_layers": 2},
            r"Mamba.* \(hook_z\) in layers 0, 1 of 2",
        ),
        ("T5Config", "Seq2SeqLM", {"d_model": 32, "num_layers": 2}, "T5ForConditionalGeneration is an encoder-decoder"),
        ("BertConfig", "MaskedLM", S, "BertForMaskedLM is an encoder"),
        ("ModernBertConfig", "MaskedLM", S, "ModernBertForMaskedLM is an encoder"),
    ],
)
def test_architectures_that_cannot_be_hooked_end_in_one_sentence(tmp_path, config, auto, options, said):
    made = getattr(transformers, config)(vocab_size=600, bos_token_id=1, eos_token_id=3, pad_token_id=3, **options)
    getattr(transformers, f"AutoModelFor{auto}").from_config(made).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=said) as error:
        dps.load_model(str(tmp_path))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_errors_say_the_whole_reason(tmp_path, tiny_folders):
    folder = shutil.copytree(tiny_folders["llama"], tmp_path / "unknown")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "not-there-yet"}))
    with pytest.raises(
        ModelLoadError, match=r"not-there-yet.*does not recognize this architecture.*pip install"
    ) as error:
        dps.load_model(str(folder))
    assert "\n" not in str(error.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        dps.load_model(str(folder))
