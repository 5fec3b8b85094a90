"""GGUF files: converted to the weights that they hold, or refused."""

import json

import gguf
import pytest
import torch
import transformers

import dps_lens as dps
from dps_lens.errors import ModelLoadError
from dps_lens.model import describe_model

TOKENS = torch.arange(5, 35)[None]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name):
    module = name.removesuffix(".weight")
    if module in OUTER:
        return f"{OUTER[module]}.weight"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.weight"


def permuted(name, weight, heads):
    """Rotary halves of a head interleaved, as llama.cpp keeps them."""
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        n = heads if "q_proj" in name else heads // 2
        return weight.reshape(n, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return weight


def write_gguf(path, model, tokenizer, without=""):
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    inner = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*dict(sorted(inner["vocab"].items(), key=lambda item: item[1]))])
    writer.add_token_merges([" ".join(pair) for pair in inner["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    for name, weight in model.state_dict().items():
        if name != without:
            writer.add_tensor(gguf_name(name), permuted(name, weight, config.num_attention_heads).numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def untied(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(3)
    config = transformers.LlamaConfig.from_pretrained(llama.folder, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_a_file_is_converted_to_the_weights_that_it_holds(untied, llama, tmp_path):
    path = write_gguf(tmp_path / "mine.gguf", untied, llama.hooked.tokenizer)
    model = dps.load_model(str(path))
    assert torch.allclose(model(TOKENS), untied(input_ids=TOKENS).logits, atol=1e-4)
    assert describe_model(model)["name"] == "mine"
    text = "Dear diary, today it rained."
    assert model.tokenizer(text)["input_ids"][-5:] == llama.hooked.tokenizer(text)["input_ids"][-5:]


def test_a_file_that_lacks_a_tensor_is_refused_and_not_kept(untied, llama, tmp_path):
    lacking = "model.layers.1.self_attn.o_proj.weight"
    path = write_gguf(tmp_path / "mine.gguf", untied, llama.hooked.tokenizer, without=lacking)
    with pytest.raises(ModelLoadError, match=r"mine\.gguf.*not hold model\.layers\.1\.self_attn\.o_proj\.weight"):
        dps.load_model(str(path))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    with pytest.raises(ModelLoadError, match="revision='main' names a version on the Hub"):
        dps.load_model(str(path), revision="main")
