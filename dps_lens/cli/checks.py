"""What commands check before they start."""

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from dps_lens.data import User
    from dps_lens.scores import HeadScores


def with_discovery(users: "list[User]") -> "list[User]":
    """The users with at least one discovery example; says who is left out."""
    from dps_lens.errors import DataError

    kept = [user for user in users if user.discovery_examples()]
    for user in users:
        if user not in kept:
            typer.echo(f"left out: user {user.id} has too short a history to find heads on", err=True)
    if not kept:
        raise DataError("no user has a history long enough to find heads on (more than 3 documents when dated)")
    return kept


def check_same_model(command: str, scores: "HeadScores", model: Any) -> None:
    """Refuse scores of another model."""
    from dps_lens.errors import ScoreError
    from dps_lens.model import describe_model

    found, wanted = describe_model(model), scores.manifest.get("model", {})
    if (found["name"], found["n_layers"], found["n_heads"]) != tuple(
        wanted.get(key) for key in ("name", "n_layers", "n_heads")
    ):
        raise ScoreError(
            f"{command}: the run scored {wanted.get('name')!r}, loaded is {found['name']!r}; give its --model"
        )


def words(text: str) -> list[str]:
    """Comma-separated names."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(option: str, text: str) -> list[int]:
    """Comma-separated whole numbers."""
    from dps_lens.errors import ScoreError

    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise ScoreError(f"--{option} {text!r} is not a list of whole numbers; write 1,5,10") from None


def decimals(option: str, text: str) -> list[float]:
    """Comma-separated numbers."""
    from dps_lens.errors import ScoreError

    try:
        return [float(word) for word in words(text)]
    except ValueError:
        raise ScoreError(f"--{option} {text!r} is not a list of numbers; write 0.5,1,2") from None
