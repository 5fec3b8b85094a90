"""`dps-lens describe` and `dps-lens paths`: what a head does, and who feeds it."""

from pathlib import Path
from typing import Annotated

import typer

from dps_lens.cli.app import app
from dps_lens.cli.checks import check_same_model, first_of, heads_of, only_of, template_kwargs, words
from dps_lens.cli.options import Device, Dtype, Force, MaxUsers, Model, Only, Outputs, Strict, TemplateKwargs, Users
from dps_lens.literals import Against

Other = Annotated[Against, typer.Option(help="The other run: another user's profile, or none.")]
Examples = Annotated[int, typer.Option(min=1, help="Newest evaluation examples of each user.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder; a run started again there resumes.")]


@app.command()
def describe(
    head: Annotated[str, typer.Argument(help="A head, such as L14H3.")],
    out: Out,
    users: Users = "probe",
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    strict: Strict = False,
    only: Only = None,
    chat_template_kwargs: TemplateKwargs = None,
    families: Annotated[
        bool, typer.Option(help="Also the head's rank among reference heads; minutes once, then cached.")
    ] = False,
    against: Other = "other_user",
    max_examples: Examples = 1,
    n_random: Annotated[int, typer.Option(min=0, help="Random other heads of the layer, measured beside it.")] = 4,
    seed: int = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """What a head reads and writes, and which tokens need it, on evaluation examples; resumes."""
    import dps_lens as dps
    from dps_lens.cli.tables import print_dossier
    from dps_lens.files import write_text

    asked = dps.Head.parse(head)
    loaded = only_of("describe", dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict), only)
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    found = dps.describe_head(
        loaded_model,
        loaded,
        asked,
        families=dps.reference_heads(loaded_model) if families else None,
        against=against,
        max_examples=max_examples,
        n_random=n_random,
        prompt_config=dps.PromptConfig(chat_template_kwargs=template_kwargs(chat_template_kwargs)),
        seed=seed,
        out=out,
        run_config=dps.RunConfig(force=force),
    )
    write_text(out / "dossier.csv", found.to_frame().to_csv(index=False))
    write_text(out / "tokens.csv", found.tokens().to_csv(index=False))
    write_text(out / "dossier.html", found.plot().to_html(include_plotlyjs=True))
    print_dossier(found)
    typer.echo(f"dossier.html, dossier.csv and tokens.csv are in {out}")


@app.command()
def paths(
    out: Out,
    run: Annotated[Path | None, typer.Option(help="Run folder of 'score' or 'find': its first heads receive.")] = None,
    k: Annotated[
        int | None, typer.Option(min=1, help="Heads to take from the run; by default 10, of 'find' the whole set.")
    ] = None,
    receivers: Annotated[str | None, typer.Option(help="Instead of a run: heads by name, such as L14H3.")] = None,
    senders: Annotated[
        str | None, typer.Option(help="Heads that may feed them, by name; by default the receivers themselves.")
    ] = None,
    into: Annotated[
        str, typer.Option(help="What of a receiver is patched: of q, k, v and resid, with commas.")
    ] = "q,k,v",
    users: Users = "probe",
    model: Model = "smollm2-135m",
    outputs: Outputs = None,
    max_users: MaxUsers = None,
    strict: Strict = False,
    chat_template_kwargs: TemplateKwargs = None,
    against: Other = "other_user",
    max_examples: Examples = 1,
    n_random: Annotated[int, typer.Option(min=1, help="Random other heads of each layer, measured in its place.")] = 2,
    seed: int = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Which heads feed which, which documents they need, and what goes to the logits directly; resumes."""
    import dps_lens as dps
    from dps_lens.cli.tables import print_edges
    from dps_lens.data.examples import held_out_examples
    from dps_lens.errors import ScoreError
    from dps_lens.files import write_text
    from dps_lens.selection import check_held_out, inherited

    if (run is None) == (receivers is None):
        raise ScoreError("paths: give either --run, a folder of 'dps-lens score' or 'find', or --receivers L14H3,L14H1")
    if k is not None and run is None:
        raise ScoreError("paths: --k is of a --run; name as many --receivers as you want")
    chosen = heads_of(run) if run else None
    loaded = dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict)
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    config = dps.PromptConfig(chat_template_kwargs=template_kwargs(chat_template_kwargs))
    if chosen:
        check_same_model("paths", chosen, loaded_model)
        check_held_out("paths", chosen, held_out_examples("paths", loaded, max_examples))
        config = inherited("paths", {"run": chosen}, uses=("prompt_config",)).prompt_config
    reading = first_of(chosen, k) if chosen else dps.HeadSet.parse(receivers or "")
    found = dps.patch_paths(
        loaded_model,
        loaded,
        dps.HeadSet.parse(senders) if senders else reading,
        reading,
        into=tuple(words(into)),  # type: ignore[arg-type]
        against=against,
        max_examples=max_examples,
        n_random=n_random,
        prompt_config=config,
        seed=seed,
        out=out,
        run_config=dps.RunConfig(force=force),
    )
    write_text(out / "edges.csv", found.edges().to_csv(index=False))
    write_text(out / "heads.csv", found.heads_frame().to_csv(index=False))
    write_text(out / "paths.html", found.plot().to_html(include_plotlyjs=True))
    print_edges(found)
    typer.echo(f"paths.html, edges.csv and heads.csv are in {out}")
