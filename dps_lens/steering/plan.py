"""What a call of `generate` comes to, checked: rows of a batch, and how tokens are chosen from their logits."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dps_lens.checks import check_flag, check_number, check_whole
from dps_lens.data.tokenizer import end_tokens
from dps_lens.errors import PromptError, SteeringError
from dps_lens.intervene import Ablation, AblationLike, Patch, Zero, find_ablation
from dps_lens.literals import Positions
from dps_lens.model import HookedModel
from dps_lens.model.positions import check_switch, is_long
from dps_lens.steering.decoder import Decoder, Row
from dps_lens.steering.decoders import Decoders, decoder_of
from dps_lens.steering.generation import Steps
from dps_lens.steering.layout import (
    Heads,
    Prompts,
    head_sets,
    layers_to_contrast,
    names_of,
    negatives_of,
    per_row,
    prompt_list,
    rows_of,
    samplings_of,
    vectors_of,
)
from dps_lens.steering.mixing import Mixer
from dps_lens.steering.rules import Rule, RuleLike, check_patch, check_strength, find_rule
from dps_lens.steering.sampling import Chooser, Sampling
from dps_lens.steering.vector import Vector

# Norms inside the model take squares, which overflow unseen: what comes out of them is 0, not infinity.
_MOST_IN_PLACE = 1e6


@dataclass(frozen=True)
class DecodeConfig:
    """Rare settings of `generate`.

    Attributes:
        ablation: what the masked branch does to the heads: `"zero"`, `"uniform"`, `Mean(z=…)`, `"patch"` (their z of
            the negative prompt's run at the same step) or one of your own; by default what the rule asks for, else
            `"zero"`.
        max_gamma: cap of a strength that the rule finds at every step.
        min_p: rule out tokens with p under this share of the largest p of the full model (of the edited one
            where the full model does not run).
        max_kl: cap on KL(steered ‖ full) at every step, nats; steering is drawn back as far as needed.
        target_kl: make KL(steered ‖ full) so many nats at every step, so that rules steer equally hard: γ and α give
            the direction alone. A step whose likeliest token gains most cannot be moved so far, and is moved less.
        early_layers: for `dola`, the layers to choose from; every second one of the lower half by default.
        stop_at_eos: end a row at the tokenizer's end-of-text token, one of the generation config, or the one that the
            chat template puts behind an answer.
        keep_delta_logits: keep steered minus full logits of every step.
        keep_alternatives: keep so many tokens that gained, and that lost, most probability at every step.
        progress: show a progress bar.
        compile: let torch compile the decoding step, with static caches and, on a GPU, as one graph: the first step of
            a batch of another size takes a minute or so, and the others less time where launching kernels is what takes
            it. The same tokens, up to ties within rounding. Ends are looked for every 8 tokens. Refused for models
            whose step with static caches is not their own, and while hooks are on the model.
    """

    ablation: AblationLike | None = None
    max_gamma: float | None = None
    min_p: float | None = None
    max_kl: float | None = None
    target_kl: float | None = None
    early_layers: Sequence[int] | None = None
    stop_at_eos: bool = True
    keep_delta_logits: bool = False
    keep_alternatives: int = 0
    progress: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name, most, why in (
            ("max_gamma", math.inf, "a cap of the strength"),
            ("min_p", 1, "a share of the largest probability"),
            ("max_kl", math.inf, "nats, of which none leaves nothing to steer"),
            ("target_kl", math.inf, "nats"),
        ):
            if (value := getattr(self, name)) is not None:
                check_number(SteeringError, f"generate: {name}", value, above=0, most=most, why=why)
        if self.max_kl is not None and self.target_kl is not None:
            raise SteeringError("generate: give max_kl, a cap, or target_kl, what every step is moved by, not both")
        check_whole(SteeringError, "generate: keep_alternatives", self.keep_alternatives, least=0)
        for name in ("stop_at_eos", "keep_delta_logits", "progress", "compile"):
            check_flag(SteeringError, f"generate: {name}", getattr(self, name))


@dataclass(frozen=True)
class Plan:
    """A call of `generate`, checked.

    Attributes:
        model: a hooked model.
        rows: of the batch, in the order of their branches.
        n_requests: prompts that are answered.
        rule: with the strengths of each request, `gammas` and `alphas`.
        ablation: of the masked branch.
        positions: where heads are edited.
        early: layers that are read off.
        samplings: one a request.
        max_new_tokens: to write.
        ends: tokens that end a row.
        config: rare settings.
        settings: all of it for a manifest.
    """

    model: HookedModel
    rows: list[Row]
    n_requests: int
    rule: Rule
    gammas: list[float]
    alphas: list[float]
    ablation: Ablation
    positions: Positions
    early: list[int]
    samplings: list[Sampling | None]
    max_new_tokens: int
    ends: set[int]
    config: DecodeConfig
    settings: dict[str, Any]

    def decoder(self) -> Decoder | Decoders:
        """What runs the rows."""
        return decoder_of(
            self.model,
            self.rows,
            compiled=self.config.compile,
            ablation=self.ablation,
            positions=self.positions,
            early=self.early,
            room=self.max_new_tokens,
        )

    def mixer(self) -> Mixer:
        """What makes one distribution a request of their logits."""
        config = self.config
        return Mixer(
            self.rule, self.gammas, self.alphas, config.max_gamma, config.min_p, config.max_kl, config.target_kl
        )

    def chooser(self) -> Chooser:
        """What chooses tokens of these."""
        return Chooser(self.samplings)

    def steps(self) -> Steps:
        """What collects the tokens."""
        keep = self.config
        return Steps(
            self.model.tokenizer, self.n_requests, keep.keep_delta_logits, keep.keep_alternatives, self.settings
        )


def plan_of(
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
) -> Plan:
    """Check a call of `generate`, whose arguments and errors these are; nothing is run."""
    chosen, config = find_rule(rule), decode_config or DecodeConfig()
    batch = prompt_list(prompts)
    gammas = per_row("gamma", gamma, len(batch)) if chosen.takes_gamma else [0.0] * len(batch)
    alphas = per_row("alpha", alpha, len(batch)) if chosen.takes_alpha else [0.0] * len(batch)
    ablation = _ablation(chosen, config)
    check_whole(SteeringError, "generate: max_new_tokens", max_new_tokens, least=1)
    check_strengths(chosen, config, gammas, alphas)
    most, why = model.cfg.d_vocab // 2, "half of the vocabulary"
    check_whole(SteeringError, "generate: keep_alternatives", config.keep_alternatives, least=0, most=most, why=why)
    samplings = samplings_of(sampling, len(batch))
    sets = head_sets(heads, len(batch), chosen)
    added = vectors_of(model, vectors, len(batch), chosen, positions)
    if isinstance(ablation, Patch) and positions != "response":
        raise SteeringError(
            "generate: heads are patched from the last prompt token on, where the two runs align; use "
            "positions='response'"
        )
    others = negatives_of(negative_prompts, batch, chosen, ablation)
    rows = rows_of(model, batch, others, sets, added, gammas, alphas, chosen, ablation, positions)
    _check_length(model, rows, max_new_tokens, ablation)
    early = layers_to_contrast(model, config.early_layers) if chosen.has("early") else []
    ends = end_tokens(model) if config.stop_at_eos else set()
    settings: dict[str, Any] = {"rule": chosen.settings(), "gamma": gammas, "alpha": alphas}
    settings |= {"heads": [names_of(one) for one in sets], "ablation": ablation.settings(), "positions": positions}
    settings |= {"early_layers": early, "max_gamma": config.max_gamma, "min_p": config.min_p, "max_kl": config.max_kl}
    settings["target_kl"] = config.target_kl
    settings["sampling"] = [one and asdict(one) for one in samplings]
    if chosen.needs_vectors:
        settings["vectors"] = [one.settings() for one in added if one is not None]
    return Plan(
        model=model,
        rows=rows,
        n_requests=len(batch),
        rule=chosen,
        gammas=gammas,
        alphas=alphas,
        ablation=ablation,
        positions=positions,
        early=early,
        samplings=samplings,
        max_new_tokens=max_new_tokens,
        ends=ends,
        config=config,
        settings=settings,
    )


def _ablation(rule: Rule, config: DecodeConfig) -> Ablation:
    """What the masked branch does: as asked for, else as the rule wants it, else zero."""
    term = rule.ablating
    if (
        term is None
        and rule.alone
        and config.ablation is not None
        and not isinstance(find_ablation(config.ablation), Zero)
    ):
        raise SteeringError(f"generate: rule {rule.name!r} ablates nothing; it takes no ablation but the default")
    own = term.ablation if term is not None else None
    asked = config.ablation
    check_patch("generate", own)
    check_patch("generate", asked)
    if own is not None and asked is not None and find_ablation(own).settings() != find_ablation(asked).settings():
        raise SteeringError(f"generate: rule {rule.name!r} has an ablation of its own, {own!r}; give none")
    return find_ablation(own or asked or "zero")


def check_strengths(rule: Rule, config: DecodeConfig, gammas: Sequence[float], alphas: Sequence[float]) -> None:
    """Refuse strengths and caps that a rule does not take.

    Raises:
        SteeringError: names the setting.
    """
    for gamma in gammas:
        check_strength("gamma", gamma)
        if rule.alone and gamma > _MOST_IN_PLACE:
            raise SteeringError(
                f"generate: rule {rule.name!r} with gamma {gamma:g} leaves nothing of the model's numbers in float32; "
                f"use at most {_MOST_IN_PLACE:g}"
            )
    for alpha in alphas:
        check_strength("alpha", alpha)
    draws_back = rule.alone or rule.has("early") or -1 in gammas or config.min_p is not None
    for name in ("max_kl", "target_kl"):
        if getattr(config, name) is not None and draws_back:
            raise SteeringError(
                f"generate: {name} is measured from the full model; it goes with contrasts of heads or prompts, "
                "without min_p, and not with gamma -1"
            )


def _check_length(model: HookedModel, rows: Sequence[Row], max_new_tokens: int, ablation: Ablation) -> None:
    for row in rows:
        check_switch(model, "generate", len(row.tokens) - 1, len(row.tokens) + max_new_tokens - 1)
    for row in (row for row in rows if row.branch == "ablated" and isinstance(ablation, Patch)):
        (other,) = (one for one in rows if one.request == row.request and one.branch == "negative")
        if is_long(model, len(row.tokens) - 1) is not is_long(model, len(other.tokens) - 1):
            raise PromptError(
                f"generate: prompt {row.request} and its negative prompt lie on both sides of a length at which the "
                "model's rotary factors change, so they share no pass"
            )
    longest = max(len(row.tokens) for row in rows)
    if longest + max_new_tokens > model.cfg.n_ctx:
        raise PromptError(
            f"generate: {longest} prompt tokens and {max_new_tokens} new ones do not fit the context of "
            f"{model.cfg.n_ctx}; lower max_new_tokens or shorten the prompt"
        )
