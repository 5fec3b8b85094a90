"""Ways to answer: what is in the prompt, which rule decodes, and the settings that are to be chosen."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from jaxtyping import Int
from torch import Tensor

from dps_lens.adapters.tuning import EPOCHS, LEARNING_RATE, RANK, SEED, UserLora
from dps_lens.data import Prompt
from dps_lens.errors import EvaluationError
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.selection import HeadSource
from dps_lens.steering import DecodeConfig, generate
from dps_lens.steering.rules import RULES, Rule, RuleLike, apart, find_rule
from dps_lens.steering.terms import Branch
from dps_lens.steering.vector import Vector

Asked: TypeAlias = RuleLike | tuple[RuleLike, HeadSource]
"""`"plain"`, `"rag"`, `"prompt"`, `"lora"`, a vector, a rule such as `"cad"`; with heads it is `("dps", scores)`."""

Shows: TypeAlias = Literal["own", "none", "note"]
"""What a prompt holds beside the task."""

Kind: TypeAlias = Literal["style", "steerx", "heads", "lora", "description"]
"""What is made of a user."""

LORA = "lora"
_SHOWN: dict[str, Shows] = {"plain": "none", "rag": "own", "prompt": "note", LORA: "none", f"rag+{LORA}": "own"}
VECTORS: dict[str, Kind] = {"stylevector": "style", "steerx": "steerx", "head_vector": "heads"}


@dataclass(frozen=True)
class Setting:
    """What is chosen for a method.

    Attributes:
        strength: γ and α, whichever the rule has; of an adapter.
        k: number of heads.
        layer: of a vector.
    """

    strength: float = 0.0
    k: int | None = None
    layer: int | None = None

    def __str__(self) -> str:
        parts = {"strength": self.strength or None, "K": self.k, "layer": self.layer}
        return ", ".join(f"{name} {value:g}" for name, value in parts.items() if value is not None) or "none"


@dataclass(frozen=True)
class Method:
    """One way to answer.

    Attributes:
        name: as it is called in the table.
        rule: how it decodes.
        shows: what the prompt holds beside the task: the profile, nothing, or a description of the user.
        family: heads of the rule.
        settings: the grid.
        vector: `"style"`, `"steerx"` or `"heads"`, if any.
        adapter: the model is tuned to the user.
    """

    name: str
    rule: Rule
    shows: Shows
    family: HeadSource | None
    settings: tuple[Setting, ...]
    vector: Kind | None = None
    adapter: bool = False

    @property
    def made(self) -> bool:
        """Whether discovery examples are needed to make something of a user."""
        return self.vector is not None or self.adapter

    @property
    def needs(self) -> list[Kind]:
        """What is made of a user before this method can answer."""
        found: list[Kind] = [self.vector] if self.vector else []
        if self.adapter:
            found.append("lora")
        if self.shows == "note":
            found.append("description")
        return found


def takes_heads(asked: RuleLike) -> bool:
    """Whether a method is given with heads, `(method, scores)`."""
    rule, vector = _rule_of(asked)
    return vector == "heads" or rule.needs_heads


def _rule_of(asked: RuleLike) -> tuple[Rule, Kind | None]:
    """The rule of a method, and the kind of vector that it adds."""
    word = asked if isinstance(asked, str) else ""
    if word in _SHOWN:
        return RULES["greedy"], None
    name, _, contrast = word.removeprefix("rag+").partition("+")
    if not (vector := VECTORS.get(name)):
        return find_rule(asked), None
    added = "head_vector" if vector == "heads" else "vector"
    return find_rule(f"{added}+{contrast}" if contrast else added), vector


def find_method(
    name: str, asked: Asked, strengths: Sequence[float], ks: Sequence[int], layers: Sequence[int]
) -> Method:
    """A method with its grid.

    `plain` answers greedily without a profile, `rag` with it, `prompt` with a description in its place. `stylevector`,
    `steerx` and `head_vector` add their vector without a profile, `lora` adds a trained change to the weights;
    `rag+stylevector` and the like do so with the profile; vectors stack with contrasts, `rag+head_vector+dps`. Rules
    that have no strength (`dola`, adaptive ones) have no grid of strengths.

    Raises:
        EvaluationError: the method is unknown, or lacks its heads.
    """
    rule_asked, family = apart(asked)
    word = rule_asked if isinstance(rule_asked, str) else ""
    (rule, vector), shows = _rule_of(rule_asked), _SHOWN.get(word, "own")
    if vector:
        shows = "own" if word.startswith("rag+") else "none"
        if rule.needs_negative and shows == "none":
            raise EvaluationError(f"evaluate: method {name!r} contrasts with no profile; ask for 'rag+{word}'")
    elif rule.needs_vectors:
        raise EvaluationError(f"evaluate: method {name!r}: ask for {', '.join(VECTORS)}, or 'rag+stylevector'")
    needs_heads = takes_heads(rule_asked)
    if needs_heads != (family is not None):
        wanted = f"needs heads, such as ({word or 'dps'!r}, scores)" if needs_heads else "takes no heads"
        raise EvaluationError(f"evaluate: method {name!r} {wanted}")
    adapter = word.removeprefix("rag+") == LORA
    free = [term for term in rule.terms if term.branch != "early" and not term.adaptive]
    grid: list[Setting] = [Setting()]
    if adapter or free:
        grid = [Setting(strength) for strength in strengths]
    elif rule.adaptive:
        grid = [Setting(1.0)]
    if needs_heads:
        grid = [Setting(one.strength, k) for one in grid for k in ks]
    if rule.has("shifted"):
        grid = [Setting(one.strength, one.k, layer) for one in grid for layer in layers]
    return Method(name, rule, shows, family, tuple(grid), vector, adapter)


@dataclass(frozen=True)
class Writer:
    """One method with one setting, ready to write."""

    method: Method
    setting: Setting
    heads: HeadSet
    vector: Vector | None = None
    adapter: UserLora | None = None

    @property
    def given(self) -> dict[Branch, float]:
        """The strengths that `generate` gives the terms of the rule."""
        return self.method.rule.given(self.setting.strength, self.setting.strength, math.inf)


def write(
    model: HookedModel,
    prompts: Mapping[str, Prompt],
    writers: Sequence[Writer],
    max_new_tokens: int,
    stop_at_eos: bool = True,
) -> list[Int[Tensor, " _"]]:
    """The answers of one example by every writer, in order: greedily, by one decoding loop.

    Args:
        model: a hooked model.
        prompts: by what they show.
        writers: methods with settings; those of one rule and prompt are rows of one `generate`.
        max_new_tokens: of an answer.
        stop_at_eos: end an answer at the model's end token.
    """
    answers: dict[int, Tensor] = {}
    calls: dict[tuple[Rule, str, int | None], list[int]] = {}
    for index, writer in enumerate(writers):
        # Every adapter is a model of its own.
        own = index if writer.adapter else None
        calls.setdefault((writer.method.rule, writer.method.shows, own), []).append(index)
    for (rule, shows, _), members in calls.items():
        chosen = [writers[index] for index in members]
        strengths = [writer.setting.strength for writer in chosen]
        options: dict[str, Any] = {"rule": rule, "decode_config": DecodeConfig(stop_at_eos=stop_at_eos)}
        if rule.takes_gamma:
            options["gamma"] = strengths
        if rule.needs_heads:
            options["heads"] = [writer.heads for writer in chosen]
        if rule.needs_vectors:
            options["vectors"] = [writer.vector for writer in chosen]
        if rule.takes_alpha:
            options["alpha"] = strengths
        if rule.needs_negative:
            options["negative_prompts"] = [prompts["none"]] * len(chosen)
        adapter = chosen[0].adapter
        with adapter.on(model, strengths[0]) if adapter else nullcontext():
            written = generate(model, [prompts[shows]] * len(chosen), max_new_tokens=max_new_tokens, **options)
        answers |= dict(zip(members, written.tokens, strict=True))
    return [answers[index] for index in range(len(writers))]


def describe(methods: Mapping[str, Method]) -> dict[str, Any]:
    """Grid and rule of every method, for a manifest."""
    return {
        name: {
            "rule": method.rule.settings(),
            "shows": method.shows,
            "vector": method.vector,
            "adapter": [RANK, EPOCHS, LEARNING_RATE, SEED] if method.adapter else None,
            "grid": [asdict(one) for one in method.settings],
        }
        for name, method in methods.items()
    }
