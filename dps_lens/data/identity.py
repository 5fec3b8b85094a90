"""What a run says of its inputs, so that it takes no results that are not its own."""

import json
from collections.abc import Sequence
from typing import Any

from dps_lens.data.examples import data_digest
from dps_lens.data.prompts import PromptConfig
from dps_lens.data.records import Example, User
from dps_lens.data.tokenizer import PromptTokenizer
from dps_lens.files import json_digest
from dps_lens.model import HookedModel, describe_model

_TURNS = [("Who is there?", "A model.")]


def describe_inputs(
    model: HookedModel, users: Sequence[User], examples: Sequence[Example], config: PromptConfig
) -> dict[str, Any]:
    """Model, prompts and data of a run, for its fingerprint.

    Args:
        model: a hooked model.
        users: all whom results depend on, in their order.
        examples: what is measured, in its order.
        config: how prompts are built.
    """
    return {
        "model": describe_model(model),
        "tokenizer": tokenizer_digest(model, config),
        "prompt_config": config.to_dict(),
        "data": data_digest(users, examples),
    }


def tokenizer_digest(model: HookedModel, config: PromptConfig) -> str:
    """Of the tokenizer, its special tokens, its chat template and what the template makes of a conversation.

    A template may hold more than its text says, such as the date. State that calls leave behind (padding and
    truncation) is not in it.
    """
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        inner: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()) if tokenizer is not None else []]
    else:
        inner = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    return json_digest([inner, special, str(getattr(tokenizer, "chat_template", None)), _rendered(model)])


def _rendered(model: HookedModel) -> str:
    if not getattr(model.tokenizer, "is_fast", False):
        return ""  # no prompt can be built with it
    prompts = PromptTokenizer(model)
    return prompts.render("And now?", _TURNS)[0] if prompts.chat else ""
