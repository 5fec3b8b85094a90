"""What a run says of its inputs, so that it takes no results that are not its own."""

from collections.abc import Sequence
from typing import Any

from dps_lens.data.examples import data_digest
from dps_lens.data.prompts import PromptConfig
from dps_lens.data.records import Example, User
from dps_lens.data.tokenizer import tokenizer_digest
from dps_lens.model import HookedModel, describe_model


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
        "tokenizer": tokenizer_digest(model, config.chat_template_kwargs),
        "prompt_config": config.to_dict(),
        "data": data_digest(users, examples),
    }
