"""`dps-lens steer`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dps_lens.cli.app import app
from dps_lens.cli.chat import chat as talk
from dps_lens.cli.chat import check_answers
from dps_lens.cli.checks import ablation_of, check_same_model, first_of, heads_of, only_of, rule_of, template_kwargs
from dps_lens.cli.options import Device, Dtype, Force, Model, Only, Outputs, Strict, TemplateKwargs, Users
from dps_lens.cli.requests import Lines, Request, read_requests, sampling_of
from dps_lens.cli.vectors import name_of, read_vectors, vector_of
from dps_lens.literals import Positions
from dps_lens.progress import progress_bar

if TYPE_CHECKING:
    from dps_lens.data import Example, Prompt, PromptConfig
    from dps_lens.model import HookedModel
    from dps_lens.steering import DecodeConfig
    from dps_lens.steering.rules import Rule
    from dps_lens.steering.vector import Vector


@app.command()
def steer(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; without it the users' examples are used.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder of 'score' or 'find', whose first heads are used.")
    ] = None,
    heads: Annotated[str | None, typer.Option(help="Heads by name, such as L12H3,L4H0.")] = None,
    k: Annotated[
        int | None, typer.Option(help="Heads to take from a run; by default 10, of 'find' the whole set.")
    ] = None,
    rule: Annotated[
        str,
        typer.Option(
            help="dps, dps-entropy, dps-js, dps-patch, decore, cad, cos, adacad, dola, amplify, head_vector, vector, "
            "stacked: dps+cad, head_vector+dps; or file.py:Name."
        ),
    ] = "dps",
    vectors: Annotated[
        Path | None,
        typer.Option(
            help="Folder of 'vectors', for head_vector and its stacks: each user's own; or of one vector, for all."
        ),
    ] = None,
    whose: Annotated[
        str | None,
        typer.Option("--vector-of", help="The user whose vector is added; by default the one who asks."),
    ] = None,
    gamma: Annotated[float, typer.Option(help="Strength of the heads; 0 is the model's own decoding.")] = 1.0,
    alpha: Annotated[
        float, typer.Option(help="Strength of the profile, for cad and cos, and of dps beside a vector.")
    ] = 0.5,
    min_p: Annotated[float | None, typer.Option(help="Rule out tokens with p under this share of the largest.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="Cap on KL(steered || full) at every step, nats.")] = None,
    target_kl: Annotated[
        float | None, typer.Option(help="Make it so many nats at every step, whatever the strengths.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines, each with 'prompt' or 'user' ('example'), and its own heads, vector_of, gamma, alpha, "
            "do_sample, temperature, top_k, top_p, seed where they differ."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with the steered model.")] = False,
    users: Users = "probe",
    outputs: Outputs = None,
    max_users: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many users; 3 without --requests and --only.")
    ] = None,
    only: Only = None,
    strict: Strict = False,
    chat_template_kwargs: TemplateKwargs = None,
    model: Model = "smollm2-135m",
    positions: Annotated[Positions, typer.Option(help="Where the second branch lacks the heads.")] = "response",
    ablation: Annotated[
        str | None,
        typer.Option(help="What it does to them: zero, uniform, or file.py:Name; by default as the rule asks."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 48,
    sample: Annotated[bool, typer.Option(help="Sample instead of greedy decoding.")] = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a batch.")] = 8,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Let torch compile the decoding step; worth it on a GPU.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Write here instead of printing, and go on where it stopped; with --chat, add the answers."),
    ] = None,
    force: Force = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Generate with DPS or another rule and write JSON lines: the plain and the steered text of each prompt."""
    import dps_lens as dps
    from dps_lens.errors import SteeringError
    from dps_lens.steering.rules import find_rule

    chosen_rule = find_rule(rule_of(rule))
    if sum((prompt is not None, requests is not None, chat)) > 1:
        raise SteeringError("steer: give one of a text, --requests and --chat")
    if only and (prompt is not None or requests is not None or chat):
        raise SteeringError("steer: --only is of the users' examples; leave out the text, --requests and --chat")
    own_heads = requests is not None and run is None
    _check_given(
        rule, chosen_rule, prompt, chat, (run is None) != (heads is None) or own_heads, vectors, whose, ablation
    )
    scores = heads_of(run) if run else None
    chosen = first_of(scores, k) if scores else dps.HeadSet.parse(heads or "")
    added = read_vectors(vectors) if vectors else None
    sampling = {"do_sample": sample, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    defaults: dict[str, Any] = {"heads": str(chosen), "gamma": gamma, "alpha": alpha, **sampling}
    if added is not None:
        whose = name_of(added, whose, None)
        defaults["vector_of"] = whose
        if chat or prompt is not None:
            vector_of(added, whose)
    sampling_of(defaults)
    config_of_prompts = dps.PromptConfig(chat_template_kwargs=template_kwargs(chat_template_kwargs))
    config = dps.DecodeConfig(
        ablation=ablation_of(ablation), min_p=min_p, max_kl=max_kl, target_kl=target_kl, compile=compiled
    )
    shared: dict[str, Any] = {"rule": chosen_rule, "positions": positions, "max_new_tokens": max_new_tokens}
    asked = (
        [] if chat else _asked(prompt, requests, users, outputs, max_users, only, strict, defaults, chosen_rule, added)
    )
    if chat and out is not None and not force:
        check_answers(out)
    about = {
        "model": model,
        "dtype": dtype,
        **shared,
        "rule": rule,
        "ablation": ablation,
        "min_p": min_p,
        "max_kl": max_kl,
        "target_kl": target_kl,
        **({"chat_template_kwargs": config_of_prompts.chat_template_kwargs} if chat_template_kwargs else {}),
    }
    lines = Lines(None if chat else out, asked, about, force=force)
    loaded_model = dps.load_model(model, device=device, dtype=dtype)
    for one in (scores, added):
        if isinstance(one, dps.Result) and "model" in one.manifest:
            check_same_model("steer", one, loaded_model)
    if chat:
        strengths = {"gamma": gamma, "alpha": alpha}
        options = {**shared, **strengths, "heads": chosen, "sampling": sampling_of(defaults), "decode_config": config}
        options |= {"vectors": vector_of(added, whose)} if added is not None else {}
        if out is not None and force:
            out.unlink(missing_ok=True)
        talk(loaded_model, options, out, chat_template_kwargs=config_of_prompts.chat_template_kwargs)
        return
    lines.begin(_decided_by(loaded_model, chosen_rule, config, config_of_prompts, added))
    bar = progress_bar(total=len(asked), initial=lines.done, desc="steering", unit="prompt", shown=out is not None)
    with bar:
        # Batches are those of a run without interruption, for the last digits of a row depend on the others.
        for start in range(lines.done - lines.done % batch_size, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            if start + len(batch) <= lines.done:
                continue
            written = list(_write(loaded_model, batch, shared, config, config_of_prompts, added))
            for index in range(max(start, lines.done), start + len(batch)):
                lines.write(asked[index], written[index - start])
                bar.update()


def _decided_by(
    model: "HookedModel",
    rule: "Rule",
    config: "DecodeConfig",
    prompt_config: "PromptConfig",
    vectors: "Mapping[str, Vector] | Vector | None",
) -> dict[str, Any]:
    """What decides the lines beside what they say of themselves."""
    from dps_lens.data.identity import describe_inputs
    from dps_lens.digests import tensor_digest
    from dps_lens.intervene import find_ablation

    inputs = describe_inputs(model, [], [], prompt_config)
    inputs.pop("data")
    ablation = find_ablation(config.ablation).settings() if config.ablation is not None else None
    digests: dict[str, Any] = {}
    if vectors is not None:
        each = vectors if isinstance(vectors, Mapping) else {"": vectors}
        digests["vectors"] = {user: [one.settings(), tensor_digest(one.values)] for user, one in each.items()}
    return {"call": "steer", "rule": rule.settings(), "ablation": ablation, **digests, **inputs}


def _check_given(
    name: str,
    rule: "Rule",
    prompt: str | None,
    chat: bool,
    has_heads: bool,
    vectors: Path | None,
    whose: str | None,
    ablation: str | None,
) -> None:
    """What a rule needs is there, before anything is loaded."""
    from dps_lens.errors import SteeringError

    if prompt is not None and not _is_text(prompt):
        raise SteeringError("steer: the text is not UTF-8")
    if rule.needs_vectors != (vectors is not None):
        wanted = "needs --vectors, a folder of 'dps-lens vectors'" if rule.needs_vectors else "adds no --vectors"
        raise SteeringError(f"steer: rule {name!r} {wanted}")
    if whose is not None and vectors is None:
        raise SteeringError("steer: --vector-of says whose of the --vectors is added; give both")
    if ablation == "patch":
        raise SteeringError("steer: heads are patched by a rule of their own, --rule dps-patch")
    if rule.needs_heads and not has_heads:
        raise SteeringError("steer: give either --run, a folder of 'dps-lens score' or 'find', or --heads L12H3,L4H0")
    if rule.needs_negative and (prompt is not None or chat):
        raise SteeringError(f"steer: rule {name!r} needs prompts with a profile; leave the text out to use --users")


def _is_text(prompt: str) -> bool:
    """Bytes of the shell that are no UTF-8 arrive as halves of characters."""
    return not any("\ud800" <= letter <= "\udfff" for letter in prompt)


def _asked(
    prompt: str | None,
    requests: Path | None,
    users: str,
    outputs: Path | None,
    max_users: int | None,
    only: Sequence[str] | None,
    strict: bool,
    defaults: Mapping[str, Any],
    rule: "Rule",
    vectors: "Mapping[str, Vector] | Vector | None",
) -> list[Request]:
    import dps_lens as dps

    if prompt is not None:
        return [Request({"prompt": prompt}, prompt, settings=defaults)]
    if requests is not None:
        people = dps.load_users(users, outputs=outputs, max_users=max_users, strict=strict)
        return read_requests(requests, people, defaults, rule, vectors)
    most = max_users if max_users or only else 3
    people = only_of("steer", dps.load_users(users, outputs=outputs, max_users=most, strict=strict), only)
    examples = [user.examples[-1] for user in people if user.examples or not only]
    return [
        Request(
            {"user": example.user_id, "example": example.id, "reference": example.reference},
            example=example,
            settings=_with_vector(defaults, example, vectors),
        )
        for example in examples
    ]


def _with_vector(
    defaults: Mapping[str, Any], example: "Example", vectors: "Mapping[str, Vector] | Vector | None"
) -> Mapping[str, Any]:
    """Settings of an example: whose vector it gets is its own user's, where nobody else is named."""
    if vectors is None:
        return defaults
    whose = name_of(vectors, defaults["vector_of"], example.user_id)
    vector_of(vectors, whose)
    return {**defaults, "vector_of": whose}


def _write(
    model: "HookedModel",
    batch: Sequence[Request],
    shared: Mapping[str, Any],
    config: "DecodeConfig",
    prompt_config: "PromptConfig",
    vectors: "Mapping[str, Vector] | Vector | None",
) -> Iterator[dict[str, Any]]:
    """Plain and steered text of each request, and how hard it was steered."""
    import dps_lens as dps

    prompts: list[Prompt | str] = [
        dps.build_prompt(model, one.example, config=prompt_config)
        if one.example
        else dps.chat_prompt(model, one.prompt or "", chat_template_kwargs=prompt_config.chat_template_kwargs)
        for one in batch
    ]
    negative: list[Prompt | str] | None = None
    if shared["rule"].needs_negative:
        negative = [dps.build_prompt(model, one.example, "none", config=prompt_config) for one in batch if one.example]
    each: dict[str, Any] = {name: [one.settings[name] for one in batch] for name in ("gamma", "alpha")}
    each["sampling"] = [sampling_of(one.settings) for one in batch]
    plain = dps.generate(
        model,
        prompts,
        rule="greedy",
        max_new_tokens=shared["max_new_tokens"],
        sampling=each["sampling"],
        decode_config=dps.DecodeConfig(compile=config.compile),
    )
    each["heads"] = [dps.HeadSet.parse(one.settings["heads"]) for one in batch]
    if vectors is not None:
        each["vectors"] = [vector_of(vectors, one.settings["vector_of"]) for one in batch]
    steered = dps.generate(model, prompts, negative_prompts=negative, decode_config=config, **each, **shared)
    for index in range(len(batch)):
        kl = float(steered.kl[index].mean())
        yield {
            "plain": plain.texts[index],
            "steered": steered.texts[index],
            "kl": None if math.isnan(kl) else kl,
        }
