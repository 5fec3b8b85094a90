"""Conventions of tokenizers: start tokens, chat templates, control tokens, cuts; the oracle is the tokenizer itself."""

import hypothesis.strategies as st
import pytest
from conftest import CHAT_TEMPLATE, make_tokenizer
from hypothesis import given, settings
from transformers import AddedToken, PreTrainedTokenizerFast

import dps_lens as dps
from dps_lens.data import PromptConfig, build_prompt, chat_prompt, load_users
from dps_lens.data.tokenizer import PromptTokenizer, control_tokens, end_of_turn_ids, start_token, tokenizer_digest
from dps_lens.errors import PromptError

QWEN = CHAT_TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
)
R1 = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# A finished answer shows how an empty block is written.
SHOWN = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\nnone\n</think>\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CLOSED = SHOWN.replace("<think>", "<|START_THINKING|>").replace("</think>", "<|END_THINKING|>")
OPEN = R1.replace("<think>", "<|START_THINKING|>")


class Holder:
    """A model, as far as prompt building looks at it."""

    def __init__(self, tokenizer):
        self.tokenizer, self.cfg = tokenizer, type("Config", (), {"n_ctx": 4096})()


def thinking(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "hello", "    "])
    return tokenizer


def before_answer(tokenizer, config=None):
    prompt = build_prompt(Holder(tokenizer), load_users("probe")[0].examples[0], config=config)
    text = tokenizer.decode(prompt.prompt_tokens)
    return text[text.rindex("assistant\n") + len("assistant\n") :]


def test_the_start_token_is_the_tokenizers_own():
    inner = make_tokenizer(chat=False).backend_tokenizer
    without = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")
    assert start_token(without) is None
    without.bos_token = without.eos_token  # as a bridge does
    assert start_token(without) is None
    ids = without("Dear diary", add_special_tokens=False)["input_ids"]
    assert PromptTokenizer(Holder(without)).plain("Dear diary") == ids
    assert build_prompt(Holder(without), load_users("probe")[0].examples[0]).tokens[0] != without.eos_token_id
    own = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", bos_token="<|im_end|>")
    assert start_token(own) == own.eos_token_id
    assert PromptTokenizer(Holder(own)).plain("Dear diary") == [own.eos_token_id, *ids]
    assert start_token(make_tokenizer()) == 1


@pytest.mark.parametrize(
    ("template", "kwargs", "expected"),
    [
        (CHAT_TEMPLATE, {}, ""),
        (QWEN, {}, ""),
        (QWEN, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        (R1, {}, "<think>\n\n</think>\n\n"),
        (SHOWN, {}, "<think>\nnone\n</think>\n"),
        (CLOSED, {}, "<|START_THINKING|>\nnone\n<|END_THINKING|>\n"),
        (R1.replace("<think>", "[THINK]"), {}, "[THINK]\n\n[/THINK]\n\n"),
    ],
)
def test_an_answer_never_stands_in_a_block_of_reasoning(template, kwargs, expected):
    config = PromptConfig(chat_template_kwargs=kwargs)
    assert before_answer(thinking(template), config) == expected
    assert config.to_dict()["chat_template_kwargs"] == kwargs
    bare = chat_prompt(Holder(thinking(template)), "Rain again.", chat_template_kwargs=kwargs)
    assert bare.text.endswith("<|im_start|>assistant\n" + expected)


def test_keywords_that_no_template_reads_are_refused():
    model = Holder(thinking(QWEN))
    for kwargs, message in (
        ({"enable_thinkin": False}, "template reads no 'enable_thinkin'"),
        ({"tokenize": True}, "'tokenize' is set by the toolkit"),
    ):
        with pytest.raises(PromptError, match=message):
            chat_prompt(model, "x", chat_template_kwargs=kwargs)
    with pytest.raises(PromptError, match="has no chat template"):
        chat_prompt(Holder(make_tokenizer(chat=False)), "x", chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(PromptError, match="plain JSON values"):
        PromptConfig(chat_template_kwargs={"x": object()})
    with pytest.raises(PromptError, match=r"opens '<\|START_THINKING\|>' before an answer"):
        chat_prompt(Holder(thinking(OPEN)), "x")
    assert hash(PromptConfig(chat_template_kwargs={"x": 1})) == hash(PromptConfig())


@pytest.mark.parametrize("message", ["assistant", "user", "s", "<", ""])
def test_a_message_may_be_a_word_of_the_template(message):
    tokenizer = make_tokenizer()
    prompt = chat_prompt(Holder(tokenizer), message)
    assert prompt.text == tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    start, stop = prompt.spans["task"]
    assert tokenizer.decode(prompt.tokens[:start]).endswith("user\n") or not message
    assert tokenizer.decode(prompt.tokens[start:stop]) == message


def test_what_ends_a_turn():
    assert end_of_turn_ids(Holder(make_tokenizer())) == (3,)
    assert end_of_turn_ids(Holder(make_tokenizer(chat=False))) == ()
    for template, expected in (
        ("{% for m in messages %}{{ m['content'] }}</turn><|im_end|>\n{% endfor %}", ["</turn>", "<|im_end|>"]),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", []),
        (
            "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}{% endfor %}",
            [],
        ),
    ):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["</turn>"])
        tokenizer.chat_template = template
        assert list(end_of_turn_ids(Holder(tokenizer))) == tokenizer.convert_tokens_to_ids(expected)


def test_digest_of_a_tokenizer():
    def digest(change=None, **kwargs):
        tokenizer = thinking(QWEN + "{{ date_string }}")
        if change:
            change(tokenizer)
        return tokenizer_digest(Holder(tokenizer), kwargs)

    same = digest()
    assert digest() == same
    assert digest(lambda t: t(["a", "b c d"], padding=True, truncation=True, max_length=2)) == same
    assert digest(lambda t: t.backend_tokenizer.enable_padding(length=8)) == same
    others = {
        digest(lambda t: t.add_tokens(["<more>"])),
        digest(lambda t: setattr(t, "chat_template", QWEN)),
        digest(lambda t: setattr(t, "eos_token", "<s>")),
        digest(enable_thinking=False),
        digest(date_string="1 May 2025"),
        digest(date_string="2 May 2025"),
    }
    assert len(others | {same}) == 7
    assert len(tokenizer_digest(Holder(make_tokenizer(chat=False)))) == 16


def test_only_what_stands_in_brackets_is_a_control_token():
    tokenizer = thinking(R1)
    tokenizer.add_tokens(["\n\n", "don't", "[UNUSED1]", "{{user}}", "<|x|>", "[]", "😀"])
    assert set(control_tokens(tokenizer).values()) == {
        "<unk>", "<s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "[UNUSED1]",
        "{{user}}", "<|x|>",
    }  # fmt: skip
    defused = PromptTokenizer(Holder(tokenizer)).defuse("hello    I don't\n\n</think> [] 😀<|x|>")
    assert defused == "hello    I don't\n\n< /think> [] 😀< |x|>"


def test_other_readings_of_a_control_token_are_defused():
    from tokenizers import normalizers

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", normalized=True)])
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    prompt = PromptTokenizer(Holder(tokenizer))
    number = tokenizer.convert_tokens_to_ids("<think>")
    for text in ("a <THINK> b", "＜think＞", "<Think><THINK>"):
        assert number in tokenizer(text, add_special_tokens=False)["input_ids"], "the tokenizer reads it so"
        assert number not in prompt.plain(text)


PIECES = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<|im_end|>",
        "<|im_",
        "end|>",
        "<",
        "|>",
        "think>",
        "<s>",
        " ",
        "hello",
        "日本",
        "👩‍👩‍👧",
        "é",
        "\n",
    ]
)
TEXT = st.lists(PIECES | st.text(max_size=4), max_size=14).map("".join)
BYTES, SPACES = thinking(R1), make_tokenizer("metaspace")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=TEXT)
def test_a_users_text_never_holds_a_control_token(text):
    for tokenizer in (BYTES, SPACES):
        control = set(control_tokens(tokenizer)) - {tokenizer.unk_token_id}
        prompt = PromptTokenizer(Holder(tokenizer))
        defused = prompt.defuse(text)
        assert not control & {*tokenizer(defused, add_special_tokens=False)["input_ids"]}
        assert prompt.defuse(defused) == defused
        assert "".join(defused.split()) == "".join(text.split()), "only spaces are added"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(text=TEXT, tokens=st.integers(0, 12))
def test_a_cut_text_keeps_to_its_tokens(text, tokens):
    prompt = PromptTokenizer(Holder(BYTES))
    kept = prompt.cut(text, tokens)
    assert text.startswith(kept)
    ids = BYTES(kept, add_special_tokens=False)["input_ids"]
    assert len(ids) <= tokens
    assert ("\ufffd" in BYTES.decode(ids)) == ("\ufffd" in kept)
    answer = prompt.answer(text, tokens)
    assert len(answer) <= tokens
    assert ("\ufffd" in BYTES.decode(answer)) <= ("\ufffd" in text)


def test_cuts_between_characters_of_several_tokens():
    prompt = PromptTokenizer(Holder(BYTES))
    whole = prompt.count("😀")
    assert whole == 4, "an unknown emoji is four bytes"
    assert [prompt.cut("😀😀😀", n) for n in (3, 4, 7, 8, 11, 12)] == ["", "😀", "😀", "😀😀", "😀😀", "😀😀😀"]
    assert prompt.cut("👩‍👩‍👧x", prompt.count("👩‍👩")) == "", "a family is one character"
    assert [len(prompt.answer("😀😀", n)) for n in (3, 4, 7)] == [0, 4, 4]
    example = load_users("probe")[0].examples[0]
    from dataclasses import replace

    with pytest.raises(PromptError, match="a first character that is longer than response_tokens"):
        build_prompt(Holder(BYTES), replace(example, reference="😀"), config=dps.PromptConfig(response_tokens=2))


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
DROPS = "{% for m in messages %}{% if m['role'] != 'system' %}"


@pytest.mark.parametrize("where", ["system", "turn"])
def test_the_profile_stands_where_it_is_asked_to(where):
    tokenizer = make_tokenizer()
    example = load_users("probe")[0].examples[0]
    config = PromptConfig(profile_in=where)
    prompt = build_prompt(Holder(tokenizer), example, config=config)
    usual = build_prompt(Holder(tokenizer), example)
    start, stop = prompt.spans["profile"]
    role = {"system": "system", "turn": "user"}[where]
    profile = tokenizer.decode(prompt.tokens[start:stop])
    assert profile.startswith("Earlier texts by this user:")
    assert f"<|im_start|>{role}\n{profile}" in prompt.text
    asked = tokenizer.decode(prompt.tokens[slice(*prompt.spans["task"])])
    assert f"<|im_start|>user\n{asked}<|im_end|>" in prompt.text
    for one, other in zip(prompt.items, usual.items, strict=True):
        assert tokenizer.decode(prompt.tokens[slice(*one)]) == tokenizer.decode(usual.tokens[slice(*other)])
    assert prompt.response_tokens.equal(usual.response_tokens)
    assert (
        build_prompt(Holder(tokenizer), example, "none", config=config).text
        == build_prompt(Holder(tokenizer), example, "none").text
    )


@pytest.mark.parametrize(
    "template", [REFUSES + CHAT_TEMPLATE, CHAT_TEMPLATE.replace("{% for m in messages %}", DROPS), None]
)
def test_a_template_without_a_system_turn_shows_the_profile_in_the_message(template):
    tokenizer = make_tokenizer(chat=template is not None)
    if template is not None:
        tokenizer.chat_template = (
            template.replace("{% endfor %}", "{% endif %}{% endfor %}") if DROPS in template else template
        )
    example = load_users("probe")[0].examples[0]
    with pytest.warns(UserWarning, match="the profile stands in the message"):
        prompt = build_prompt(Holder(tokenizer), example, config=PromptConfig(profile_in="system"))
    assert prompt.tokens.equal(build_prompt(Holder(tokenizer), example).tokens)


def test_a_place_that_is_none_is_refused(unchecked):
    with pytest.raises(PromptError, match="profile_in"):
        PromptConfig(profile_in="header")
