"""Users in: records, readers, retrieval, prompts, and the built-in probe users."""

from dps_lens.data.documents import Document
from dps_lens.data.pairs import make_pairs
from dps_lens.data.prompts import Note, Prompt, PromptConfig, Shown, build_prompt, chat_prompt
from dps_lens.data.readers import load_users
from dps_lens.data.records import Example, User

__all__ = [
    "Document",
    "Example",
    "Note",
    "Prompt",
    "PromptConfig",
    "Shown",
    "User",
    "build_prompt",
    "chat_prompt",
    "load_users",
    "make_pairs",
]
