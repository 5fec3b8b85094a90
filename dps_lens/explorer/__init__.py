"""Look at a run: heads, overlap, ablation and steered text in one page, offline or with a live model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dps_lens.explorer.content import explore
    from dps_lens.explorer.page import Exploration
    from dps_lens.explorer.server import LivePage, serve
    from dps_lens.explorer.views import ExampleView

__all__ = ["ExampleView", "Exploration", "LivePage", "explore", "serve"]

_HOME = {"ExampleView": "views", "Exploration": "page", "LivePage": "server", "explore": "content", "serve": "server"}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that a page that was made before opens without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'dps_lens.explorer' has no attribute {name!r}")
    return getattr(import_module(f"dps_lens.explorer.{_HOME[name]}"), name)
