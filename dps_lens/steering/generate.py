"""Generate with Differential Preference Steering, or a rule to compare it with, for many users at once."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dps_lens.data import Prompt
from dps_lens.errors import PromptError, SteeringError
from dps_lens.heads import Head, HeadSet
from dps_lens.intervene import Ablation, Positions
from dps_lens.model import HookedModel
from dps_lens.steering.decoder import Branch, Decoder, Kind
from dps_lens.steering.generation import Generation, Steps, TextStream
from dps_lens.steering.mixing import Mixer
from dps_lens.steering.rules import Rule, check_strength, find_rule
from dps_lens.steering.sampling import Sampler, choose
from dps_lens.steering.vector import SteeringVector

Heads: TypeAlias = HeadSet | Mapping[Head, float]
"""A set of heads, or heads with weights from 0 (untouched) to 1 (all of the edit)."""


def generate(
    model: HookedModel,
    prompts: "Prompt | str | Sequence[Prompt | str]",
    *,
    heads: "Heads | Sequence[Heads] | None" = None,
    vectors: SteeringVector | Sequence[SteeringVector] | None = None,
    gamma: float | Sequence[float] = 1.0,
    rule: str = "dps",
    without: "Prompt | str | Sequence[Prompt | str] | None" = None,
    alpha: float | Sequence[float] = 0.5,
    max_gamma: float | None = None,
    plausibility: float | None = None,
    max_shift: float | None = None,
    early_layers: Sequence[int] | None = None,
    ablation: Ablation = "zero",
    positions: Positions = "response",
    max_new_tokens: int = 64,
    do_sample: bool | Sequence[bool] = False,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    seed: int | Sequence[int] = 0,
    stop_at_eos: bool = True,
    keep_delta_logits: bool = False,
    keep_alternatives: int = 0,
    stream: bool = False,
    progress: bool = False,
) -> Generation | TextStream:
    """Generate by contrasting the model with itself.

    | rule | logits | source |
    |---|---|---|
    | `dps` | `(1 + γ) · full − γ · masked` | arXiv 2604.22345 |
    | `dps-entropy` | the same, γ the entropy of the full distribution in nats | its published code |
    | `decore` | the same with the heads' attention spread evenly; for retrieval heads | arXiv 2410.18860 |
    | `cad`, `cos` | `(1 + α) · full − α · without`, the prompt without its profile | arXiv 2305.14739, 2405.01768 |
    | `dola` | `log p − log p_early`, of the farthest early layer; tokens under 0.1 · max p are out | arXiv 2309.03883 |
    | `amplify` | of the model whose heads' z is multiplied by 1 + γ; no second branch | |
    | `vector` | of the model to whose residual stream γ times a steering vector is added; no second branch | |
    | `dps+cad` | `full + γ (full − masked) + α (full − without)`; any rule of heads, or `vector`, with `cad` | |

    All branches run as rows of one batch with a KV cache; a row that ends leaves it.

    Args:
        model: a hooked model.
        prompts: of `build_prompt`, or texts that are given to the model as they are. Prompts may differ
            in length; a reference answer in them is not shown to the model.
        heads: one set for all prompts, or one a prompt; heads with weights (`{Head(3, 1): 0.5}`) are edited in part.
        vectors: for `vector`, such as `style_vector(…)`: one for all prompts, or one a prompt.
        gamma: strength of the heads or vectors, one for all prompts or one a prompt, at least −1. 0 is the model's own
            decoding and costs nothing extra; −1 is the masked model, in one branch.
        rule: see above.
        without: for `cad` and `cos`, each prompt without its profile: `build_prompt(…, profile="none")`.
        alpha: strength of the prompt, one for all or one a prompt, at least 0.
        max_gamma: cap of an entropy γ.
        plausibility: rule out tokens with p under this share of the largest p of the full model (of the edited one
            where the full model does not run).
        max_shift: cap on KL(steered ‖ full) at every step, nats; steering is drawn back as far as needed.
        early_layers: for `dola`, the layers to choose from; every second one of the lower half by default.
        ablation: `"zero"` or `"uniform"`, what the masked branch does to the heads.
        positions: `"response"` (from the last prompt token on; branches share the prompt's pass), `"all"` or
            `"profile"`.
        max_new_tokens: stop after so many.
        do_sample: sample instead of greedy decoding; this and the next three for all prompts or one a prompt.
        temperature: of sampling.
        top_k: sample from the `top_k` likeliest tokens.
        top_p: sample from the smallest set of tokens that holds this probability.
        seed: of sampling, one for all prompts or one a prompt.
        stop_at_eos: end a row at the model's end-of-text or end-of-turn token.
        keep_delta_logits: keep steered minus full logits of every step.
        keep_alternatives: keep so many tokens that gained, and that lost, most probability at every step.
        stream: return an iterator of `(row, new text)` as it is written; its `.generation` is the whole.
            The edits stay on the model until the iterator ends or is closed.
        progress: show a progress bar.

    Raises:
        SteeringError: arguments do not fit together.
        PromptError: a prompt and its new tokens do not fit the context.
    """
    found = find_rule(rule)
    ablation = "uniform" if found.uniform else ablation
    batch = _as_list(prompts)
    gammas = _per_row("gamma", gamma, len(batch)) if found.edits else [0.0] * len(batch)
    alphas = _per_row("alpha", alpha, len(batch)) if found.prompt else [0.0] * len(batch)
    _check(found, rule, ablation, max_new_tokens, gammas, alphas, plausibility, max_shift, max_gamma)
    sampling = {"do_sample": do_sample, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    each = [_per_row(name, value, len(batch)) for name, value in sampling.items()]
    samplers = [Sampler(*values) for values in zip(*each, strict=True)]
    generators = [torch.Generator().manual_seed(int(value)) for value in _per_row("seed", seed, len(batch))]
    sets = _sets(heads, len(batch), found)
    added = _vectors(model, vectors, len(batch), found, positions)
    others = _others(without, batch, found)
    branches = _branches(model, batch, others, sets, added, gammas, alphas, found, ablation, positions)
    _check_length(model, branches, max_new_tokens)
    early = layers_to_contrast(model, early_layers) if found.early else []
    ends = _end_tokens(model) if stop_at_eos else set()
    settings: dict[str, Any] = {"rule": rule, "gamma": gammas, "alpha": alphas, "heads": [_names(one) for one in sets]}
    settings |= {"ablation": ablation, "positions": positions, "early_layers": early, "max_gamma": max_gamma}
    if found.vector:
        settings["vectors"] = [{"label": one.label, "layer": one.layer} for one in added if one is not None]
    settings |= {"plausibility": plausibility, "max_shift": max_shift, "seed": seed, **sampling}
    steps = Steps(model.tokenizer, len(batch), keep_delta_logits, keep_alternatives, settings)
    mixer = Mixer(found, gammas, alphas, max_gamma, plausibility, max_shift)
    decoder = Decoder(model, branches, ablation=ablation, positions=positions, early=early, room=max_new_tokens)
    written = _decode(decoder, mixer, samplers, generators, steps, max_new_tokens, ends, progress)
    if stream:
        return TextStream(written, steps)
    for _ in written:
        pass
    return steps.generation()


def _decode(
    decoder: Decoder,
    mixer: Mixer,
    samplers: Sequence[Sampler],
    generators: Sequence[torch.Generator],
    steps: Steps,
    max_new_tokens: int,
    ends: set[int],
    progress: bool,
) -> Iterator[list[int]]:
    """Step by step; yields the requests that got a token, which is in `steps`."""
    running, token = list(range(steps.rows)), None
    bar = tqdm(total=max_new_tokens, desc="generating", disable=None if progress else True)
    with bar, decoder:
        order = _lay_out(decoder, mixer, running)
        for _ in range(max_new_tokens):
            full, steered = mixer(*decoder.step(token))
            chosen = choose(steered, [samplers[row] for row in running], [generators[row] for row in running])
            going = [value not in ends for value in steps.add(running, chosen, full, steered)]
            bar.update()
            yield running
            if not any(going):
                break
            if not all(going):
                left = {row for row, goes in zip(running, going, strict=True) if goes}
                decoder.keep(torch.tensor([branch.request in left for branch in decoder.branches]))
                chosen = chosen[torch.tensor(going, device=chosen.device)]
                running = [row for row in running if row in left]
                order = _lay_out(decoder, mixer, running)
            token = chosen[order]


def _lay_out(decoder: Decoder, mixer: Mixer, running: Sequence[int]) -> Int[Tensor, " branch"]:
    """Tell the mixer where the branches stand; for each of them, where its request stands among those that run."""
    device = decoder.mask.device
    mixer.lay_out(decoder.branches, running, device)
    return torch.tensor([running.index(branch.request) for branch in decoder.branches], device=device)


def _branches(
    model: HookedModel,
    batch: Sequence[Prompt | str],
    others: Sequence[Prompt | str],
    sets: Sequence[Heads],
    added: Sequence[SteeringVector | None],
    gammas: Sequence[float],
    alphas: Sequence[float],
    rule: Rule,
    ablation: Ablation,
    positions: Positions,
) -> list[Branch]:
    """Rows of the batch: the full model, then what it is contrasted with, for the requests that need it."""
    untouched = torch.ones(model.cfg.n_layers, model.cfg.n_heads)
    found: dict[Kind, list[Branch]] = {"full": [], "edited": [], "without": []}
    for row, (prompt, other, heads, vector) in enumerate(zip(batch, others, sets, added, strict=True)):
        tokens, profile = _ids(model, prompt), _profile(prompt)
        alone = rule.alone or (rule.heads and not rule.adaptive and not rule.prompt and gammas[row] == -1)
        edits = rule.edits and gammas[row] != 0
        if edits and positions == "profile" and profile[0] == profile[1]:
            raise SteeringError("generate: positions='profile' needs prompts that show a profile")
        if not (alone and edits):
            found["full"].append(Branch(row, "full", tokens, profile, untouched))
        factors = _factors(model, heads, gammas[row] if rule.amplify else -1.0, ablation)
        if edits:
            scaled = (vector.layer, gammas[row] * vector.values) if vector else None
            found["edited"].append(Branch(row, "edited", tokens, profile, factors, scaled))
        if rule.prompt and alphas[row]:
            ids = _ids(model, other)
            if ids.tolist() == tokens.tolist():
                raise SteeringError(
                    f"generate: prompt {row} and its without= are the same; the contrast would be nothing"
                )
            found["without"].append(Branch(row, "without", ids, _profile(other), untouched))
    return [branch for kind in found.values() for branch in kind]


def _factors(model: HookedModel, heads: Heads, change: float, ablation: Ablation) -> Float[Tensor, "layer head"]:
    """What z of each head is multiplied by: 1 + weight · change."""
    weights = {head: 1.0 for head in heads} if isinstance(heads, HeadSet) else dict(heads)
    HeadSet(weights).mask(model.cfg)
    if any(not 0 <= weight <= 1 for weight in weights.values()):
        raise SteeringError("generate: weights of heads lie between 0 (untouched) and 1")
    if ablation == "uniform" and any(weight not in (0, 1) for weight in weights.values()):
        raise SteeringError("generate: ablation 'uniform' edits a head as a whole; use weights 0 and 1, or 'zero'")
    factors = torch.ones(model.cfg.n_layers, model.cfg.n_heads)
    for head, weight in weights.items():
        factors[head] = 1 + weight * change
    return factors


def _sets(heads: "Heads | Sequence[Heads] | None", rows: int, rule: Rule) -> list[Heads]:
    if not rule.needs_heads:
        return [HeadSet()] * rows
    if heads is None:
        raise SteeringError("generate: this rule needs heads=, such as scores.top(10)")
    sets: list[Any] = [heads] * rows if isinstance(heads, (HeadSet, Mapping)) else list(heads)
    if len(sets) != rows:
        raise SteeringError(f"generate: {rows} prompts and {len(sets)} head sets; give one set for each prompt")
    return sets


def _vectors(
    model: HookedModel, vectors: Any, rows: int, rule: Rule, positions: Positions
) -> Sequence[SteeringVector | None]:
    if not rule.vector:
        return [None] * rows
    if vectors is None:
        raise SteeringError("generate: this rule needs vectors=, such as style_vector(model, user)")
    if positions != "response":
        raise SteeringError("generate: vectors are added from the last prompt token on; use positions='response'")
    found: list[Any] = [vectors] * rows if isinstance(vectors, SteeringVector) else list(vectors)
    if len(found) != rows:
        raise SteeringError(f"generate: {rows} prompts and {len(found)} vectors; give one for each prompt")
    for vector in found:
        vector.check("generate", model)
    return found


def _others(without: Any, batch: Sequence[Prompt | str], rule: Rule) -> Sequence[Prompt | str]:
    if not rule.prompt:
        return batch
    if without is None:
        raise SteeringError("generate: this rule needs without=, each prompt without its profile (profile='none')")
    others = _as_list(without)
    if len(others) != len(batch):
        raise SteeringError(f"generate: {len(batch)} prompts and {len(others)} in without=; give one for each prompt")
    return others


def _check(
    rule: Rule,
    name: str,
    ablation: Ablation,
    max_new_tokens: int,
    gammas: Sequence[float],
    alphas: Sequence[float],
    plausibility: float | None,
    max_shift: float | None,
    max_gamma: float | None,
) -> None:
    if ablation not in ("zero", "uniform"):
        raise SteeringError(f"generate: ablation {ablation!r} is not offered here; use 'zero' or 'uniform'")
    if rule.alone and ablation != "zero":
        raise SteeringError(f"generate: rule {name!r} ablates nothing; it takes no ablation but the default")
    if max_new_tokens < 1:
        raise SteeringError(f"generate: max_new_tokens {max_new_tokens} asks for no token")
    for gamma in gammas:
        check_strength("gamma", gamma)
    for alpha in alphas:
        check_strength("alpha", alpha)
    if max_gamma is not None and max_gamma <= 0:
        raise SteeringError(f"generate: max_gamma {max_gamma} leaves no contrast; it is a cap above 0")
    if plausibility is not None and not 0 < plausibility <= 1:
        raise SteeringError(f"generate: plausibility {plausibility} is a share above 0, at most 1")
    if max_shift is not None:
        if max_shift <= 0:
            raise SteeringError(f"generate: max_shift {max_shift} leaves nothing to steer; it is a KL above 0, in nats")
        if rule.alone or rule.early or -1 in gammas or plausibility is not None:
            raise SteeringError(
                "generate: max_shift draws back to the full model; it goes with contrasts of heads or prompts, without "
                "plausibility, and not with gamma -1"
            )


def _check_length(model: HookedModel, branches: Sequence[Branch], max_new_tokens: int) -> None:
    longest = max(len(branch.tokens) for branch in branches)
    if longest + max_new_tokens > model.cfg.n_ctx:
        raise PromptError(
            f"generate: {longest} prompt tokens and {max_new_tokens} new ones do not fit the context of "
            f"{model.cfg.n_ctx}; lower max_new_tokens or shorten the prompt"
        )


def layers_to_contrast(model: HookedModel, layers: Sequence[int] | None = None) -> list[int]:
    """Layers that DoLa chooses from: as asked for, or the even ones of the lower half.

    Raises:
        SteeringError: a layer is not between the first and the last.
    """
    n_layers = model.cfg.n_layers
    if layers is None:
        return list(range(2, n_layers // 2 + 1, 2)) or [max(1, n_layers // 2)]
    if not layers or not all(0 < layer < n_layers for layer in layers):
        raise SteeringError(f"generate: early_layers {list(layers)} are not layers between 1 and {n_layers - 1}")
    return list(layers)


def _as_list(prompts: Any) -> list[Prompt | str]:
    found = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    if not found:
        raise SteeringError("generate: no prompts were given")
    return found


def _names(heads: Heads) -> str:
    return str(heads) if isinstance(heads, HeadSet) else ",".join(f"{Head(*h)}:{w:g}" for h, w in heads.items())


def _profile(prompt: Prompt | str) -> tuple[int, int]:
    return prompt.spans["profile"] if isinstance(prompt, Prompt) else (0, 0)


def _ids(model: HookedModel, prompt: Prompt | str) -> Int[Tensor, " pos"]:
    if isinstance(prompt, Prompt):
        ids = prompt.prompt_tokens
    else:
        ids = torch.tensor(model.tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=torch.long)
        bos = model.tokenizer.bos_token_id
        # A chat template opens with its own marker, which for some models is the BOS token.
        if bos is not None and ids[:1].tolist() != [bos]:
            ids = torch.cat([torch.tensor([bos]), ids])
    if len(ids) < 2:
        raise SteeringError("generate: a prompt needs at least two tokens, the start token included")
    return ids


def _per_row(name: str, value: Any, rows: int) -> list[Any]:
    values = list(value) if isinstance(value, Sequence) else [value] * rows
    if len(values) != rows:
        raise SteeringError(f"generate: {len(values)} values of {name} for {rows} prompts")
    return values


def _end_tokens(model: HookedModel) -> set[int]:
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    return {int(token) for token in (*found, model.tokenizer.eos_token_id) if token is not None}
