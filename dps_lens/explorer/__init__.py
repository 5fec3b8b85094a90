"""Look at a run: heads, overlap, ablation and steered text in one page, offline or with a live model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dps_lens.explorer.content import explore
    from dps_lens.explorer.page import ExampleView, Exploration

__all__ = ["ExampleView", "Exploration", "explore"]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used, so that a page that was made before opens without torch."""
    if name not in __all__:
        raise AttributeError(f"module 'dps_lens.explorer' has no attribute {name!r}")
    from dps_lens.explorer import content, page

    return getattr(content if name == "explore" else page, name)
