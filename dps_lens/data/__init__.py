"""Users in: records, readers, retrieval, prompts, and the built-in probe users."""

from dps_lens.data.prompts import Note, Prompt, PromptConfig, build_prompt, chat_prompt
from dps_lens.data.readers import load_users
from dps_lens.data.records import Discovery, Document, Example, User

__all__ = [
    "Discovery",
    "Document",
    "Example",
    "Note",
    "Prompt",
    "PromptConfig",
    "User",
    "build_prompt",
    "chat_prompt",
    "load_users",
]
