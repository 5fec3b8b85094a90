"""`dps-lens profile` and `dps-lens key`: what a server knows of its users, and who may ask it."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import App, app
from dps_lens.cli.checks import heads_of
from dps_lens.cli.options import MaxUsers, Outputs, Strict
from dps_lens.cli.serve import check_installed, check_rule

profiles = App(help="Users' steering profiles, for 'dps-lens serve'.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(profiles, name="profile")

Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder of profiles, a file for each user.")]


@profiles.command()
def make(
    users: Annotated[str, typer.Argument(help="'probe', or a file of users, as in --users of other commands.")],
    out: Folder,
    run: Annotated[
        Path | None, typer.Option(help="Run folder of 'score' or 'find', whose first heads are taken.")
    ] = None,
    vectors: Annotated[Path | None, typer.Option(help="Run folder of 'vectors'.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Heads to take; by default 10, of 'find' the whole set.")] = None,
    own: Annotated[bool, typer.Option("--own", help="Take heads by a user's own examples, not by all users'.")] = False,
    rule: Annotated[
        str | None, typer.Option(help="By default dps, without --run head_vector; see 'dps-lens steer'.")
    ] = None,
    gamma: Annotated[float, typer.Option(help="Strength of the rule.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="Strength of its second contrast.")] = 0.5,
    max_kl: Annotated[float | None, typer.Option(help="Cap on KL(steered || full) at every step, nats.")] = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="Keep the users' documents there, for the server to show in prompts.")
    ] = False,
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    strict: Strict = False,
) -> None:
    """Write a profile for each user from what was found: heads, a vector, and how to steer with them."""
    check_installed()
    import dps_lens as dps
    from dps_lens.serving import ProfileStore, make_profiles
    from dps_lens.steering.plan import check_strengths

    name = rule or ("dps" if run else "head_vector")
    chosen = check_rule("profile", name, has_heads=run is not None, has_vectors=vectors is not None)
    check_strengths(chosen, dps.DecodeConfig(max_kl=max_kl), [gamma], [alpha])
    people = dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict)
    made = make_profiles(
        people,
        heads_of(run) if run else None,
        vectors=dps.HeadVectors.load(vectors) if vectors else None,
        k=k,
        own=own,
        documents=documents,
        rule=name,
        gamma=gamma,
        alpha=alpha,
        max_kl=max_kl,
    )
    store = ProfileStore(out)
    for one in made:
        store.write(one)
    typer.echo(f"profiles of {len(made)} users are in {out}; serve them: dps-lens serve --profiles {out}")


@profiles.command("list")
def list_(out: Folder) -> None:
    """Show whose profiles there are, and how each user is steered for."""
    check_installed()
    from dps_lens.errors import FileError
    from dps_lens.serving import ProfileStore

    store = ProfileStore(out)
    for user in store:
        try:
            one = store.read(user)
        except FileError as error:  # the others are shown
            typer.echo(str(error), err=True)
            continue
        if one is not None:
            heads = f"{len(one.head_set())} heads, " if one.heads else ""
            vector = "a vector, " if one.vector else ""
            typer.echo(f"{user}: {one.rule}, gamma {one.gamma:g}, {heads}{vector}{len(one.documents)} documents")


@profiles.command()
def delete(user: Annotated[str, typer.Argument(help="Whose profile.")], out: Folder) -> None:
    """Delete everything that is kept of a user."""
    check_installed()
    from dps_lens.errors import DataError
    from dps_lens.serving import ProfileStore

    if not ProfileStore(out).delete(user):
        raise DataError(f"profile: there is no profile of user {user!r} in {out}")
    typer.echo(f"the profile of {user!r} is deleted")


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Of whoever holds it; it stands in the server's log.")],
    keys: Annotated[Path, typer.Option("--keys", help="File of keys, to which it is added.")],
    admin: Annotated[bool, typer.Option("--admin", help="It may write and delete profiles.")] = False,
    users: Annotated[
        str | None, typer.Option(help="Users whose profiles it may steer with, with commas; by default all.")
    ] = None,
) -> None:
    """Make a key for 'dps-lens serve --keys FILE' and print it; the file keeps a digest only."""
    check_installed()
    from dps_lens.serving import add_key

    made = add_key(keys, name, admin=admin, users=None if users is None else [one for one in users.split(",") if one])
    typer.echo(made)
    typer.echo(f"it is shown this once; {keys} keeps its digest", err=True)
