"""Small random models of many architectures, and what is right for them by plain transformers alone."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from conftest import make_tokenizer
from torch import Tensor

S = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
H = {**S, "head_dim": 8}
MHA = {**S, "num_key_value_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FALCON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 1e4,
}

ARCHITECTURES: dict[str, dict] = {
    "Afmoe": {**H, **MOE, "num_dense_layers": 1, "num_shared_experts": 1, **SLIDING},
    "Apertus": S,
    "Arcee": S,
    "BitNet": S,
    "Bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "CodeGen": {**GPT, "rotary_dim": 4},
    "Cohere": S,
    "Cohere2": {**H, **SLIDING},
    "DeepseekV3": {**MHA, **MLA},
    "Ernie4_5": H,
    "Ernie4_5_Moe": {**S, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "Exaone4": {**H, **SLIDING},
    "Falcon": {**FALCON, "multi_query": True, "parallel_attn": True, "bias": False},
    "Falcon, ALiBi": {**FALCON, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    "Falcon, new decoder": {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "bias": False},
    "FalconMamba": {"hidden_size": 32, "num_hidden_layers": 3},
    "FlexOlmo": {**S, "num_experts": 4, "num_experts_per_tok": 2},
    "GPT2": GPT,
    "GPTBigCode": {**GPT, "multi_query": True},
    "GPTBigCode, many queries": {**GPT, "multi_query": False},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "GPTNeo": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 24,
        "max_position_embeddings": 512,
    },
    "GPTNeoX": {name: value for name, value in S.items() if name != "num_key_value_heads"},
    "Gemma": H,
    "Gemma2": {**H, "sliding_window": 24},
    "Gemma3Text": {**H, **SLIDING},
    "Gemma4Text": {**H, **SLIDING},
    "Glm": H,
    "Glm4": H,
    "Glm4Moe": {**H, **{name: MLA[name] for name in list(MLA)[5:]}},
    "GptOss": {**H, **LOCAL_MOE, **SLIDING},
    "Granite": S,
    "GraniteMoe": {**S, **LOCAL_MOE},
    "Helium": H,
    "HunYuanDenseV1": H,
    "Jais2": S,
    "JetMoe": {
        **{name: S[name] for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size")},
        "kv_channels": 8,
        **LOCAL_MOE,
    },
    "Lfm2": {**S, "layer_types": ["conv", "full_attention", "full_attention"]},
    "Llama": S,
    "Llama, dynamic rope": {**S, "max_position_embeddings": 64, "rope_parameters": DYNAMIC},
    "Llama, llama3 rope": {**S, "rope_parameters": LLAMA3},
    "Llama, yarn": {**S, "rope_parameters": YARN},
    "Llama4Text": {
        **H,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 64,
    },
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 3},
    "MiniMaxM2": {**H, **LOCAL_MOE, "rotary_dim": 4},
    "Ministral": {**H, **SLIDING},
    "Ministral3": H,
    "Mistral": {**H, "sliding_window": 24},
    "Mixtral": {**H, **LOCAL_MOE},
    "ModernBertDecoder": S,
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2, "max_seq_len": 512},
    "NanoChat": S,
    "Nemotron": S,
    "OPT": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 512,
    },
    "Olmo": S,
    "Olmo2": S,
    "Olmo3": {**S, **SLIDING},
    "Olmoe": {**S, "num_experts": 4, "num_experts_per_tok": 2},
    "OpenAIGPT": GPT,
    "Persimmon": S,
    "Phi": {**S, "partial_rotary_factor": 0.5},
    "Phi3": S,
    "Phi3, longrope": {**S, "original_max_position_embeddings": 64, "rope_parameters": LONG},
    "Qwen2": S,
    "Qwen2Moe": {**S, **MOE, "shared_expert_intermediate_size": 16},
    "Qwen3": H,
    "Qwen3Moe": {**H, **MOE},
    "RecurrentGemma": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96},
    "SeedOss": H,
    "SmolLM3": S,
    "StableLm": S,
    "Starcoder2": S,
    "VaultGemma": {**H, "sliding_window": 24},
    "XGLM": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 512},
    "Youtu": {**MHA, **{name: MLA[name] for name in list(MLA)[:4]}, "v_head_dim": 8},
}
"""Options of the config class `NameConfig`, by name; what follows a comma tells variants apart."""

_PROJECTION = re.compile(r"(attn|attention)[a-z_]*\.(o_proj|out_proj|dense|c_proj|[wW]o|out)$")


def save_random(name: str, folder: Path) -> None:
    """Write a random model whose heads matter, with a tokenizer, as `from_pretrained` reads it."""
    config_class = getattr(transformers, name.partition(",")[0] + "Config")
    tokenizer = make_tokenizer()
    options = {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 3, **ARCHITECTURES[name]}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(vocab_size=len(tokenizer), **options), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Plain:
    """A model without hooks, whose heads are edited where the output projection reads them."""

    def __init__(self, folder: Path, **options: str) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        self.projections = [module for name, module in self.model.named_modules() if _PROJECTION.search(name)]
        self.n_layers = len(self.projections)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens[None], use_cache=False).logits[0]

    @contextmanager
    def edited(self, layer: int, columns: slice, change: Callable[[Tensor], Tensor], begin: int = 0) -> Iterator[None]:
        """Inside, `change` gives what the projection of a layer reads in these columns from position `begin` on."""

        def edit(module: object, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            # Some attentions hand rows and positions over as one dimension.
            z = given[0].clone()
            rows = z[0] if z.ndim == 3 else z
            rows[begin:, columns] = change(rows[begin:, columns])
            return (z, *given[1:])

        handle = self.projections[layer].register_forward_pre_hook(edit)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def evenly(self, layer: int, head: int, n_heads: int, begin: int) -> Iterator[None]:
        """Inside, a head attends evenly to what it sees: the softmax of eager attention is replaced, nothing else."""
        calls, real = [0], torch.nn.functional.softmax

        def even(scores: Tensor, *arguments: object, **options: object) -> Tensor:
            weights = real(scores, *arguments, **options)
            if scores.ndim == 4 and scores.shape[1] == n_heads:
                if calls[0] == layer:
                    seen = (weights[:, head, begin:] > 0).to(weights)
                    weights = weights.clone()
                    weights[:, head, begin:] = seen / seen.sum(-1, keepdim=True)
                calls[0] += 1
            return weights

        torch.nn.functional.softmax = even
        try:
            yield
        finally:
            torch.nn.functional.softmax = real
        assert calls[0] == self.n_layers, f"{calls[0]} softmaxes over heads in {self.n_layers} layers"
