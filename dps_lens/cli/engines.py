"""Where a command's units are made: here, on Ray workers, or a part of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dps_lens.errors import RunError

if TYPE_CHECKING:
    from dps_lens.model import HookedModel
    from dps_lens.work import Engine

_PANEL = "Many machines"

Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Make the units in so many Ray workers.", rich_help_panel=_PANEL, show_default="none"),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray", help="Address of a running Ray cluster, such as auto; else Ray runs here.", rich_help_panel=_PANEL
    ),
]
Cpus = Annotated[int, typer.Option(min=1, help="CPU cores, and threads, of a worker.", rich_help_panel=_PANEL)]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs of a worker.", rich_help_panel=_PANEL)]
ShardOf = Annotated[
    str | None,
    typer.Option(
        "--shard", help="Do the users of one part only, such as 2/8; 'dps-lens merge' joins.", rich_help_panel=_PANEL
    ),
]


@contextmanager
def engine_of(
    workers: int | None, address: str | None, cpus: int, gpus: int | float, shard: str | None
) -> Iterator["Engine | None"]:
    """The engine that the options ask for; says at the end what it did."""
    import dps_lens as dps

    if shard is not None and (workers or address):
        raise RunError("--shard is for sites without Ray; leave out --workers and --ray")
    if shard is not None:
        yield dps.Shard.parse(shard)
    elif workers or address:
        with dps.RayEngine(address, workers or 2, cpus, gpus) as engine:
            yield engine
            typer.echo(f"last step: {engine.summary}", err=True)
    else:
        yield None


def load_for(engine: "Engine | None", name: str, device: str | None, dtype: str) -> "HookedModel":
    """The model; without weights where workers hold them."""
    import dps_lens as dps

    if not isinstance(engine, dps.RayEngine):
        return dps.load_model(name, device=device, dtype=dtype)
    if device is not None:
        raise RunError("--device is for runs without workers; workers take GPUs with --gpus")
    model = dps.load_model(name, device="meta", dtype=dtype)
    engine.start(model)
    return model


def say_shard(shard: str | None, out: Path) -> None:
    """What to do with a part."""
    if shard is not None:
        typer.echo(f"these are the users of shard {shard}; when all are done: dps-lens merge {out} … --out FOLDER")
