"""`dps-lens report` and `dps-lens explore`."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model, families, heads_of, numbers
from dps_lens.cli.options import Device, Dtype, Model, Outputs, Users

if TYPE_CHECKING:
    from dps_lens.data import User
    from dps_lens.dossier import Dossier
    from dps_lens.explorer import Exploration
    from dps_lens.explorer.code import Origin
    from dps_lens.found import FoundHeads
    from dps_lens.paths import PathEffects
    from dps_lens.scores import HeadScores
    from dps_lens.validation.effects import SetEffects

SHOWN = 6
"""Users with attention and texts."""

Folder = Annotated[Path, typer.Argument(help="Run folder of 'score' or 'demo'.")]
Effects = Annotated[Path | None, typer.Option(help="Run folder of 'ablate', for the ablation tab.")]
Mechanism = Annotated[
    list[Path] | None,
    typer.Option("--with", help="Run folder of 'describe' or 'paths', for a tab of what heads do; may be repeated."),
]
Kinds = Annotated[
    str, typer.Option(help="Families to compare with, such as induction,retrieval,function_vector; minutes once.")
]
TopK = Annotated[int, typer.Option(min=1, help="Heads to compare, and to outline where none were found or tested.")]
Gammas = Annotated[
    str | None, typer.Option(help="Positions of the γ slider; by default those of 'demo', else 0.5,1,2.")
]
Ks = Annotated[str | None, typer.Option(help="Positions of the K slider; by default those of 'demo', else 5,10.")]
Shown = Annotated[
    int | None,
    typer.Option(min=1, help="Users with attention and texts, spread over all; by default those of 'demo', else 6."),
]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens of a text; by default what the task needs.")]
Force = Annotated[bool, typer.Option(help="Write texts and attention anew.")]


@app.command()
def report(
    run: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file.")] = Path("report.html"),
    users: Users = "probe",
    outputs: Outputs = None,
    ablation: Effects = None,
    mechanism: Mechanism = None,
    kinds: Kinds = "",
    k: TopK = 10,
    gammas: Gammas = None,
    ks: Ks = None,
    shown_users: Shown = None,
    max_new_tokens: Length = None,
    model: Model = "smollm2-135m",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    packed: Annotated[Path | None, typer.Option(hidden=True, help="Also keep what 'demo --show' opens here.")] = None,
) -> None:
    """Write a run as one HTML page that works offline: maps, heads, overlap, ablation, steered text."""
    from dps_lens.explorer.page import check_page, pack

    if not force:
        check_page(out)
    exploration, *_ = _explored(
        "report", run, users, outputs, ablation, mechanism, kinds, k, gammas, ks, shown_users, max_new_tokens, model,
        device, dtype, force,
    )  # fmt: skip
    typer.echo(f"report: {exploration.write(out, force=force)}")
    if packed is not None:
        pack(exploration, packed)


@app.command()
def explore(
    run: Folder,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1.")] = 8050,
    users: Users = "probe",
    outputs: Outputs = None,
    ablation: Effects = None,
    mechanism: Mechanism = None,
    kinds: Kinds = "",
    k: TopK = 10,
    gammas: Gammas = None,
    ks: Ks = None,
    shown_users: Shown = None,
    max_new_tokens: Length = None,
    model: Model = "smollm2-135m",
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
    vectors: Annotated[
        Path | None, typer.Option(help="Run folder of 'vectors', whose head vectors the page can steer with.")
    ] = None,
) -> None:
    """The page of 'report' with a live model, to ask anything of, any heads. Only this machine can open it."""
    import dps_lens as dps
    from dps_lens.explorer.server import LivePage, check_flask, check_port, make_app
    from dps_lens.model import ModelThread

    check_flask()
    check_port(port)

    thread = ModelThread()
    exploration, loaded, people, first = thread.run(
        _explored, "explore", run, users, outputs, ablation, mechanism, kinds, k, gammas, ks, shown_users,
        max_new_tokens, model, device, dtype, force,
    )  # fmt: skip
    added = None
    if vectors is not None:
        added = dps.HeadVectors.load(vectors)
        check_same_model("explore", added, loaded)
    origin = _origin(run, len(people) if first else None, users, outputs, model, device, dtype, vectors)
    with LivePage(make_app(loaded, people, exploration, origin, added, thread), port) as live:
        typer.echo(f"{live.url}  (Ctrl-C ends it)")
        try:
            live.wait()
        except KeyboardInterrupt:
            typer.echo("ended")


def _origin(
    run: Path,
    first: int | None,
    users: str,
    outputs: Path | None,
    model: str,
    device: str | None,
    dtype: str,
    vectors: Path | None,
) -> "Origin":
    """The lines of Python that make the page's model and users, and the options of commands that load the same.

    A command can take the first so many users, and no others.
    """
    from dps_lens.explorer.code import Origin

    more = f", outputs={str(outputs)!r}" if outputs is not None else ""
    where = f", device={device!r}" * (device is not None) + f", dtype={dtype!r}" * (dtype != "auto")
    lines = [
        f"scored = dps.HeadScores.load({str(run)!r}).users",
        f"model = dps.load_model({model!r}{where})",
        f"users = [user for user in dps.load_users({users!r}{more}) if user.id in scored]",
        *([f"vectors = dps.HeadVectors.load({str(vectors)!r})"] if vectors is not None else []),
    ]
    options = ["--users", users, *(["--outputs", str(outputs)] if outputs is not None else [])]
    options += ["--max-users", str(first), "--model", model]
    options += [*(["--device", device] if device is not None else []), *(["--dtype", dtype] if dtype != "auto" else [])]
    return Origin("\n".join(lines), options if first is not None else None)


def _explored(
    command: str,
    run: Path,
    users: str,
    outputs: Path | None,
    ablation: Path | None,
    mechanism: list[Path] | None,
    kinds: str,
    k: int,
    gammas: str | None,
    ks: str | None,
    shown_users: int | None,
    max_new_tokens: int | None,
    model: str,
    device: str | None,
    dtype: str,
    force: bool,
) -> "tuple[Exploration, Any, list[User], bool]":
    """The run's scores with everything that the page adds, kept in its folder; the model; the users, and if they are
    the first that there are.
    """
    import dps_lens as dps
    from dps_lens.errors import DataError, ScoreError

    scores = heads_of(run)
    if not isinstance(scores, dps.HeadScores):
        raise ScoreError(
            f"{command}: {run} is a run of 'find', which has no map for each user; give a run of 'score', or call "
            "dps_lens.explore with the found set among its families"
        )
    if "shard" in scores.manifest:
        typer.echo(
            f"{command}: {run} holds the scores of part {scores.manifest['shard']} of its users; the command that made "
            "it goes on with the others",
            err=True,
        )
    effects = dps.SetEffects.load(ablation) if ablation is not None else None
    beside = [_mechanism(folder) for folder in mechanism or ()]
    everybody = dps.load_users(users, outputs=outputs)
    people = [user for user in everybody if user.id in {*scores.users}]
    if not people:
        raise DataError(
            f"{command}: none of the run's users ({scores.users[0]} …) is in --users {users}; name their file"
        )
    settings = _texts(
        run, numbers("gammas", gammas, float) if gammas is not None else None,
        numbers("ks", ks, int) if ks is not None else None, shown_users, max_new_tokens,
    )  # fmt: skip
    loaded = dps.load_model(model, device=device, dtype=dtype)
    found, cost, maps = _of_demo(run)
    for one in (scores, *beside, *maps.values(), *(one for one in (found, cost) if one is not None)):
        check_same_model(command, one, loaded)
    references: dict[str, HeadScores | FoundHeads] = {"found": found} if found is not None else {}
    references |= dps.reference_heads(loaded, families(kinds)) if kinds else {}
    exploration = dps.explore(
        loaded, people, {scores.name: scores, **maps} if maps else scores, families=references, effects=effects,
        cost=cost, k=k, run_config=dps.RunConfig(force=force), **settings,
    )  # fmt: skip
    return exploration.showing(*beside), loaded, people, people == everybody[: len(people)]


def _mechanism(folder: Path) -> "Dossier | PathEffects":
    import dps_lens as dps

    kind = dps.PathEffects if (folder / f"{dps.PathEffects.stem}.json").is_file() else dps.Dossier
    return kind.load(folder)


def _of_demo(run: Path) -> "tuple[FoundHeads | None, SetEffects | None, dict[str, HeadScores]]":
    """What 'demo' measured beside its scores: the set that was found, the tested heads, and the paper's PCS."""
    import dps_lens as dps

    found = dps.FoundHeads.load(run / "found") if (run / "found" / f"{dps.FoundHeads.stem}.json").is_file() else None
    tested, paper = run / "ablation", run / "pcs"
    cost = dps.SetEffects.load(tested) if (tested / f"{dps.SetEffects.stem}.json").is_file() else None
    if cost is not None and cost.manifest.get("call") != "ablation_cost":
        cost = None
    has_paper = (paper / f"{dps.HeadScores.stem}.json").is_file()
    if not has_paper:
        return found, cost, {}
    scores = dps.HeadScores.load(paper)
    return found, cost, {paper_name(scores): scores}


def paper_name(scores: "HeadScores") -> str:
    """What the page calls the paper's PCS, by how much of it was measured."""
    about = {"attribution": ", first-order estimate", "screened": ", the largest of them measured"}
    return f"the paper's PCS{about.get(str(scores.manifest.get('method')), '')}"


def _texts(
    run: Path, gammas: "list[float] | None", ks: "list[int] | None", shown_users: int | None, length: int | None
) -> dict[str, Any]:
    """What texts are shown, by default those of 'demo', and the folder where they are kept, beside those of others."""
    import dps_lens as dps

    usual: dict[str, Any] = {"gammas": [0.5, 1.0, 2.0], "ks": [5, 10], "max_users": SHOWN}
    written, of_demo = run / "page" / "grid", None
    if (written / f"{dps.SteeringGrid.stem}.json").is_file():
        grid = dps.SteeringGrid.load(written)
        of_demo = {"gammas": list(grid.gammas), "ks": list(grid.ks), "max_users": len({one.user for one in grid.texts})}
    asked = {"gammas": gammas and sorted(gammas), "ks": ks and sorted(ks), "max_users": shown_users}
    shown = (of_demo or usual) | {name: value for name, value in asked.items() if value is not None}
    if shown == of_demo and length is None:
        return {**shown, "out": run / "page"}
    digest = hashlib.sha256(repr((*shown.values(), length)).encode()).hexdigest()[:8]
    return {**shown, "max_new_tokens": length, "out": run / f"page-{digest}"}
