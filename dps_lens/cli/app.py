"""The command line's root."""

import typer

app = typer.Typer(
    help="Find the attention heads that carry a user's preferences, prove that they do, and steer with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
