"""Generate with Differential Preference Steering, or a rule to compare it with, for many users at once."""

from collections.abc import Iterator, Sequence
from typing import Literal, overload

import torch
from jaxtyping import Int
from torch import Tensor

from dps_lens.literals import Positions
from dps_lens.model import HookedModel
from dps_lens.progress import progress_bar
from dps_lens.steering.decoder import Decoder
from dps_lens.steering.decoders import Decoders
from dps_lens.steering.generation import Generation, Steps, TextStream
from dps_lens.steering.layout import Heads, Prompts
from dps_lens.steering.mixing import Mixer
from dps_lens.steering.plan import DecodeConfig, Plan, plan_of
from dps_lens.steering.rules import RuleLike
from dps_lens.steering.sampling import Sampling
from dps_lens.steering.vector import Vector

_BLOCK, _BLOCK_BYTES = 8, 2**28


@overload
def generate(
    model: HookedModel,
    prompts: Prompts,
    *,
    heads: Heads | Sequence[Heads] | None = ...,
    vectors: Vector | Sequence[Vector] | None = ...,
    gamma: float | Sequence[float] = ...,
    rule: RuleLike = ...,
    negative_prompts: Prompts | None = ...,
    alpha: float | Sequence[float] = ...,
    positions: Positions = ...,
    max_new_tokens: int = ...,
    sampling: Sampling | Sequence[Sampling | None] | None = ...,
    decode_config: DecodeConfig | None = ...,
    stream: Literal[False] = ...,
) -> Generation: ...


@overload
def generate(
    model: HookedModel,
    prompts: Prompts,
    *,
    heads: Heads | Sequence[Heads] | None = ...,
    vectors: Vector | Sequence[Vector] | None = ...,
    gamma: float | Sequence[float] = ...,
    rule: RuleLike = ...,
    negative_prompts: Prompts | None = ...,
    alpha: float | Sequence[float] = ...,
    positions: Positions = ...,
    max_new_tokens: int = ...,
    sampling: Sampling | Sequence[Sampling | None] | None = ...,
    decode_config: DecodeConfig | None = ...,
    stream: Literal[True],
) -> TextStream: ...


def generate(
    model: HookedModel,
    prompts: Prompts,
    *,
    heads: Heads | Sequence[Heads] | None = None,
    vectors: Vector | Sequence[Vector] | None = None,
    gamma: float | Sequence[float] = 1.0,
    rule: RuleLike = "dps",
    negative_prompts: Prompts | None = None,
    alpha: float | Sequence[float] = 0.5,
    positions: Positions = "response",
    max_new_tokens: int = 64,
    sampling: Sampling | Sequence[Sampling | None] | None = None,
    decode_config: DecodeConfig | None = None,
    stream: bool = False,
) -> Generation | TextStream:
    """Generate by contrasting the model with itself.

    | rule | logits | source |
    |---|---|---|
    | `dps` | `(1 + γ) · full − γ · masked` | arXiv 2604.22345 |
    | `dps-js`, `adacad` | `dps` and `cad`, strengths the Jensen–Shannon divergence of both in nats | arXiv 2409.07394 |
    | `dps-patch` | `dps` with the heads' z of the negative prompt's run in the masked branch, step by step | |
    | `dps-entropy` | `dps`, γ the entropy of the full distribution in nats | its published code |
    | `decore` | the same with the heads' attention spread evenly; for retrieval heads | arXiv 2410.18860 |
    | `cad`, `cos` | `(1 + α) · full − α · negative`, the prompt without its profile | arXiv 2305.14739, 2405.01768 |
    | `dola` | `log p − log p_early`, of the farthest early layer; tokens under 0.1 · max p are out | arXiv 2309.03883 |
    | `amplify` | of the model whose heads' z is multiplied by 1 + γ; no second branch | |
    | `vector` | of the model to whose residual stream γ times a steering vector is added; no second branch | |
    | `head_vector` | of the model to whose heads' z γ times a vector is added; no second branch | arXiv 2306.03341 |
    | `dps+cad` | `full + γ (full − masked) + α (full − negative)`; any rule of heads or vectors with `cad` | |
    | `head_vector+dps` | `added + α (added − masked)`, γ times the vector in both; any vector with any contrast | |
    | `greedy` | of the model itself | |

    All branches run as rows of one batch with a KV cache; a row that ends leaves it.

    Args:
        model: a hooked model.
        prompts: of `build_prompt`, or texts that are given to the model as they are. Prompts may differ
            in length; a reference answer in them is not shown to the model.
        heads: one set for all prompts, or one a prompt; heads with weights (`{Head(3, 1): 0.5}`) are edited in part.
        vectors: for `vector`, such as `style_vector(…)`, and for `head_vector`, such as `head_vectors(…)[user]`: one
            for all prompts, or one a prompt.
        gamma: strength of the heads or vectors, one for all prompts or one a prompt, at least −1. Where nothing is
            stacked, 0 is the model's own decoding and costs nothing extra; −1 of `dps` is the masked model, in one
            branch.
        rule: see above; or a `Term` of your own, or two terms that stack.
        negative_prompts: for `cad`, `cos` and `dps-patch`, each prompt without its profile:
            `build_prompt(…, profile="none")`; for `dps-patch` also with another user's.
        alpha: strength of the negative prompt, and of any contrast beside a vector, which has γ; one for all or one a
            prompt, at least 0. Where a contrast finds its strength itself, 0 leaves it out.
        positions: `"response"` (from the last prompt token on; branches share the prompt's pass), `"all"` or
            `"profile"`.
        max_new_tokens: stop after so many.
        sampling: sample instead of greedy decoding, in one way for all prompts or one a prompt.
        decode_config: rare settings: the ablation, caps, what is kept.
        stream: return an iterator of `(row, new text)` as it is written; its `.generation` is the whole.
            Between its pieces the model is bare, and free for other calls of the same thread.

    Raises:
        SteeringError: arguments do not fit together, or logits become NaN or infinite; names the prompt and the step.
        InterventionError: the ablation cannot act while text is written.
        PromptError: a prompt and its new tokens do not fit the context, or cross a length at which the model's
            rotary factors change.
        ModelBusyError: another thread is using the model.
    """
    plan = plan_of(
        model,
        prompts,
        heads=heads,
        vectors=vectors,
        gamma=gamma,
        rule=rule,
        negative_prompts=negative_prompts,
        alpha=alpha,
        positions=positions,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        decode_config=decode_config,
    )
    decoder, steps = plan.decoder(), plan.steps()
    written = _decode(plan, decoder, steps)
    if stream:
        return TextStream(written, steps)
    with decoder:
        for _ in written:
            pass
    return steps.generation()


def _decode(plan: Plan, decoder: Decoder | Decoders, steps: Steps) -> Iterator[list[int]]:
    """Some steps at a time; yields the requests that got tokens, which are in `steps`."""
    mixer, choose, config, max_new_tokens = plan.mixer(), plan.chooser(), plan.config, plan.max_new_tokens
    running, token = list(range(steps.rows)), None
    order, block = _lay_out(decoder, mixer, running), 1
    if config.compile:
        # The logits of a block are held until its ends are looked for.
        block = max(1, min(_BLOCK, _BLOCK_BYTES // (8 * len(running) * plan.model.cfg.d_vocab)))
    with progress_bar(total=max_new_tokens, desc="generating", unit="token", shown=config.progress) as bar:
        for done in range(0, max_new_tokens, block):
            ran, going = running, torch.ones(len(running), dtype=torch.bool)
            with decoder:
                made = []
                for _ in range(min(block, max_new_tokens - done)):
                    full, steered = mixer(*decoder.step(token))
                    chosen = choose(steered, running)
                    made.append((chosen, full, steered))
                    token = chosen[order]
                for one in made:
                    # What a row wrote behind its end, up to the next look, is nothing.
                    places = going.nonzero().flatten()
                    rows = [running[place] for place in places.tolist()]
                    left = one if len(rows) == len(running) else (t[places.to(t.device)] for t in one)
                    going[places] = torch.tensor([value not in plan.ends for value in steps.add(rows, *left)])
                    bar.update()
                    if not bool(going.any()):
                        break
                if bool(going.any()) and not bool(going.all()):
                    staying = {row for row, goes in zip(running, going.tolist(), strict=True) if goes}
                    decoder.keep(torch.tensor([row.request in staying for row in decoder.rows]))
                    chosen = chosen[going.to(chosen.device)]
                    running = [row for row in running if row in staying]
                    order = _lay_out(decoder, mixer, running)
                    token = chosen[order]
            yield ran
            if not bool(going.any()):
                break


def _lay_out(decoder: Decoder | Decoders, mixer: Mixer, running: Sequence[int]) -> Int[Tensor, " row"]:
    """Tell the mixer where the branches stand; for each row, where its request stands among those that run."""
    mixer.lay_out(decoder.rows, running, decoder.device)
    return torch.tensor([running.index(row.request) for row in decoder.rows], device=decoder.device)
