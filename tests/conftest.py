"""Small random models of several architectures, their tokenizers, and the embedded model."""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jaxtyping

# Shapes and types in public signatures are checked while the tests run.
jaxtyping.install_import_hook("dps_lens", "beartype.beartype")

import plants
import pytest
import toy
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import dps_lens as dps
from dps_lens.data import load_users

# `make test-tl3` runs these in an environment of their own.
collect_ignore = [] if version("transformer-lens").startswith("3.") else ["test_hooked_transformer.py"]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONTEXT = {"max_position_embeddings": 1024}
GQA = {"num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": (transformers.LlamaConfig, {**SIZES, **CONTEXT, **GQA}),
    "qwen2": (transformers.Qwen2Config, {**SIZES, **CONTEXT, "num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, {**SIZES, **CONTEXT, **GQA}),
    "gemma2": (transformers.Gemma2Config, {**SIZES, **CONTEXT, **GQA, "sliding_window": 24}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {
            **SIZES,
            **CONTEXT,
            **GQA,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 1 + ["sliding_attention"],
        },
    ),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 1024}),
    "gpt_neox": (transformers.GPTNeoXConfig, {**SIZES, **CONTEXT}),
}
ARCHITECTURES = list(CONFIGS)


def probe_texts() -> list[str]:
    return [
        f"{document.fields['title']}\n{document.fields['text']}"
        for user in load_users("probe")
        for document in user.history
    ]


def make_tokenizer(kind: str = "byte", *, chat: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A small tokenizer trained on the probe texts: byte-level BPE, or metaspace BPE as of SentencePiece."""
    inner = Tokenizer(models.BPE(unk_token=None if kind == "byte" else "<unk>"))
    special = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
    if kind == "byte":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        inner.decoder = decoders.Metaspace()
        alphabet = ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(probe_texts(), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_hf_model(architecture: str, vocab_size: int = 600, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose heads matter: weights are large enough that ablations change the loss."""
    config_class, options = CONFIGS[architecture]
    torch.manual_seed(seed)
    config = config_class(vocab_size=vocab_size, **options, bos_token_id=1, eos_token_id=3, pad_token_id=3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


class Tiny:
    """A hooked model and the plain Hugging Face model with the same weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.hooked = dps.load_model(self.folder)
        self.plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def unchecked():
    """Without run-time type checks: what a user sees who passes a wrong value."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    # transformer-lens 3.9 guesses architectures from names, so the folders' names say nothing.
    folders = {architecture: root / f"m{index}" for index, architecture in enumerate(ARCHITECTURES)}
    for architecture, folder in folders.items():
        make_hf_model(architecture, len(tokenizer)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def tinies(tiny_folders):
    loaded: dict[str, Tiny] = {}

    def get(architecture: str) -> Tiny:
        if architecture not in loaded:
            loaded[architecture] = Tiny(tiny_folders[architecture])
        return loaded[architecture]

    return get


@pytest.fixture(params=ARCHITECTURES)
def tiny(request, tinies) -> Tiny:
    return tinies(request.param)


@pytest.fixture
def llama(tinies) -> Tiny:
    return tinies("llama")


@pytest.fixture(scope="session")
def real():
    """The embedded model; installed by `make test`."""
    return dps.load_model()


@pytest.fixture(scope="session")
def probe():
    return load_users("probe")


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory):
    """A model in which one known head carries the profile."""
    return dps.load_model(str(toy.build(tmp_path_factory.mktemp("toy"))))


@pytest.fixture(scope="session")
def toy_users(tmp_path_factory):
    return load_users(write_jsonl(tmp_path_factory.mktemp("users") / "docs.jsonl", toy.records()))


@pytest.fixture(scope="session")
def planted(tmp_path_factory):
    """Models whose carriers of the profile are known, by name."""
    loaded: dict[str, plants.Planted] = {}

    def get(name: str) -> plants.Planted:
        if name not in loaded:
            loaded[name] = plants.load(name, tmp_path_factory.mktemp(name))
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def short():
    """Small prompts, so that slow oracles stay quick."""
    return dps.PromptConfig(items=3, profile_tokens=60, task_tokens=30, response_tokens=8)


@pytest.fixture(scope="session")
def browser_path() -> str:
    """Chromium or Chrome of this machine."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    return found


@pytest.fixture(scope="session")
def browser(browser_path):
    """A headless browser without a network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        yield found
        found.close()


class Page:
    """A page in the browser, with everything that went wrong in it."""

    def __init__(self, browser, *, offline: bool = True, **context) -> None:
        self.context = browser.new_context(offline=offline, viewport={"width": 1280, "height": 1000}, **context)
        self.page, self.problems = self.context.new_page(), []
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.problems.append(said.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("requestfailed", lambda request: self.problems.append(f"failed: {request.url[:100]}"))
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))


@pytest.fixture
def open_page(browser):
    opened = []

    def open_(url: str, **options) -> Page:
        opened.append(Page(browser, **options))
        opened[-1].page.goto(url)
        return opened[-1]

    yield open_
    for one in opened:
        one.context.close()


@pytest.fixture(scope="session")
def development_data() -> Path:
    folder = os.environ.get("DPS_LENS_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DPS_LENS_DATA names no folder of development data")
    return Path(folder)


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def no_hooks_left(model) -> bool:
    return all(not point.fwd_hooks and not point.bwd_hooks for point in model.hook_dict.values())
