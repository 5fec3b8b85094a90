"""`dps-lens serve`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model, first_of, heads_of, template_kwargs
from dps_lens.cli.options import Device, Dtype, Model, TemplateKwargs
from dps_lens.cli.vectors import read_vectors, vector_of

if TYPE_CHECKING:
    from dps_lens.steering.rules import Rule


@app.command()
def serve(
    model: Model = "smollm2-135m",
    profiles: Annotated[
        Path | None, typer.Option(help="Folder of users' profiles, of 'dps-lens profile make'.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder of 'score' or 'find', whose heads steer requests that name nobody.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="Or heads by name, such as L12H3,L4H0.")] = None,
    vectors: Annotated[Path | None, typer.Option(help="Or a folder of one vector, for rules that add it.")] = None,
    rule: Annotated[
        str | None, typer.Option(help="How requests that say nothing are steered; not at all without heads or vector.")
    ] = None,
    gamma: Annotated[float, typer.Option(help="Its strength.")] = 1.0,
    max_kl: Annotated[
        float | None, typer.Option(help="Cap on KL(steered || full) at every step, where a request says none.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call the model; by default as --model, or a path's end.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address; one that other machines reach needs --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    keys: Annotated[Path | None, typer.Option(help="File of 'dps-lens key'; only these are let in.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a text may have.")] = 1024,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows of the batch; a steered text takes two or three.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that wait; more get status 429.")] = 256,
    max_positions: Annotated[
        int | None, typer.Option(min=1, help="Keys and values to hold; by default what half of the free memory holds.")
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 4 * 2**20,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 600.0,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="Positions of a prompt that are run between two steps of the others.")
    ] = 256,
    chat_template_kwargs: TemplateKwargs = None,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve a steered model over OpenAI's API: each user's own heads, many users in one batch.

    A request says how it is steered in the field "dps": {"user": "ann"}, or {"heads": "L12H3", "gamma": 2}.
    """
    check_installed()
    import dps_lens as dps
    from dps_lens.errors import SteeringError
    from dps_lens.serving import Keys, Limits, ModelThread, Steering, make_server
    from dps_lens.serving.run import bound, check_host, server_of

    if sum(one is not None for one in (run, heads)) > 1:
        raise SteeringError("serve: give --run or --heads, not both")
    chosen_rule = rule or ("dps" if run or heads else "head_vector" if vectors else "greedy")
    check_rule("serve", chosen_rule, has_heads=bool(run or heads), has_vectors=vectors is not None)
    who = Keys.read(keys) if keys else None
    check_host(host, who)
    found, added = heads_of(run) if run else None, read_vectors(vectors) if vectors else None
    socket = bound(host, port)
    try:
        thread = ModelThread()
        loaded = thread.run(dps.load_model, model, device=device, dtype=dtype)
        for one in (found, added):
            if isinstance(one, dps.Result) and "model" in one.manifest:
                check_same_model("serve", one, loaded)
        default = Steering(
            rule=chosen_rule,
            heads=first_of(found, None) if found else dps.HeadSet.parse(heads or ""),
            vector=vector_of(added, None) if added is not None else None,
            gamma=gamma,
            max_kl=max_kl,
        )
        application = thread.run(
            make_server,
            loaded,
            thread=thread,
            name=name or (Path(model).name if Path(model).exists() else model),
            profiles=profiles,
            keys=who,
            default=default,
            limits=Limits(
                rows=max_rows,
                positions=max_positions,
                waiting=max_waiting,
                tokens=max_tokens,
                bytes=max_bytes,
                seconds=timeout,
                chunk=prefill_chunk,
            ),
            prompt_config=dps.PromptConfig(chat_template_kwargs=template_kwargs(chat_template_kwargs)),
        )
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{socket.getsockname()[1]}"
        typer.echo(f"serving {application.state.name} at {address}/v1; Ctrl-C finishes the answers and stops", err=True)
        server_of(application).run(sockets=[socket])
    finally:
        socket.close()


def check_installed() -> None:
    """Say what to install where there is no server.

    Raises:
        SteeringError: there is none.
    """
    from dps_lens.errors import SteeringError

    try:
        import dps_lens.serving  # noqa: F401
    except ImportError as error:
        raise SteeringError(f"serve: {error}") from error


def check_rule(command: str, name: str, *, has_heads: bool, has_vectors: bool) -> "Rule":
    """A rule, which has what it needs, before anything is loaded.

    Raises:
        SteeringError: it lacks heads or a vector.
    """
    from dps_lens.errors import SteeringError
    from dps_lens.steering.rules import find_rule

    rule = find_rule(name)
    if rule.needs_heads and not has_heads:
        raise SteeringError(f"{command}: rule {name!r} needs heads; give --run, a folder of 'dps-lens find' or 'score'")
    if rule.needs_vectors and not has_vectors:
        raise SteeringError(f"{command}: rule {name!r} needs --vectors, a folder of 'dps-lens vectors'")
    return rule
