"""Where a text ends: end of text, generation config, and the end of a turn in the chat template."""

import pytest
import torch
import transformers
from conftest import CHAT_TEMPLATE, make_tokenizer

import dps_lens as dps
from dps_lens.data.tokenizer import end_tokens
from dps_lens.heads import HeadSet

LLAMA3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
SPACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s> {{ m['content'] }} {% else %}{{ m['content'] }} <|im_end|>"
    "<|im_start|>{% endif %}{% endfor %}"
)
UNMARKED = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
STRICT = (
    "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}{{ messages[0]['content'] }}"
)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """A model that wants to end its turn at once, by a token that only its chat template knows for an end."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<s>"
    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        vocab_size=600, n_embd=32, n_layer=2, n_head=4, n_positions=1024, rotary_dim=4, eos_token_id=1, bos_token_id=1
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.bias[3] += 1e3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return dps.load_model(str(folder))


def test_a_text_ends_with_the_turn_of_the_chat_template(eager, probe, short):
    prompt = dps.build_prompt(eager, probe[0].examples[0], config=short)
    out = dps.generate(eager, prompt, heads=HeadSet.parse("L0H0"), max_new_tokens=6)
    assert out.tokens[0].tolist() == [3]
    on = dps.DecodeConfig(stop_at_eos=False)
    out = dps.generate(eager, prompt, heads=HeadSet.parse("L0H0"), max_new_tokens=6, decode_config=on)
    assert out.tokens[0].tolist() == [3] * 6


@pytest.mark.parametrize(
    ("template", "ends"),
    [(CHAT_TEMPLATE, {1, 3}), (LLAMA3, {1, 3}), (SPACED, {1, 2, 3}), (UNMARKED, {1}), (STRICT, {1}), (None, {1})],
)
def test_ends_by_template(eager, template, ends):
    own = eager.tokenizer.chat_template
    eager.tokenizer.chat_template = template
    try:
        assert end_tokens(eager) == ends
    finally:
        eager.tokenizer.chat_template = own
