"""Ways to answer: what is in the prompt, which rule decodes, and the settings that are to be chosen."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from jaxtyping import Int
from torch import Tensor

from dps_lens.analysis.rankings import Family
from dps_lens.data import Prompt
from dps_lens.errors import EvaluationError
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.steering import SteeringVector, generate
from dps_lens.steering.rules import Rule, find_rule
from dps_lens.steering.tuning import EPOCHS, LEARNING_RATE, RANK, SEED, UserLora

Asked: TypeAlias = str | tuple[str, Family]
"""`"plain"`, `"rag"`, `"prompt"`, `"lora"`, a vector, a rule such as `"cad"`; with heads it is `("dps", scores)`."""

Shown: TypeAlias = Literal["own", "none", "note"]

Kind: TypeAlias = Literal["style", "steerx", "lora", "description"]
"""What is made of a user."""

GREEDY = Rule()
LORA = "lora"
_SHOWN: dict[str, Shown] = {"plain": "none", "rag": "own", "prompt": "note", LORA: "none", f"rag+{LORA}": "own"}
VECTORS: dict[str, Kind] = {"stylevector": "style", "steerx": "steerx"}


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
        rule: how it decodes; greedy decoding is a rule without parts.
        rule_name: as `generate` calls it; empty for greedy decoding.
        shows: what the prompt holds beside the task: the profile, nothing, or a description of the user.
        family: heads of the rule.
        settings: the grid.
        vector: `"style"` or `"steerx"`, if any.
        adapter: the model is tuned to the user.
    """

    name: str
    rule: Rule
    rule_name: str
    shows: Shown
    family: Family | None
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

    @property
    def call(self) -> tuple[str, str]:
        """Settings of methods that share this are rows of one `generate`."""
        return ("" if self.rule == GREEDY else self.rule_name, self.shows)


def is_own_method(name: str) -> bool:
    """A method of its own, not a rule of `generate`."""
    return name in _SHOWN or name.removeprefix("rag+") in VECTORS


def find_method(
    name: str, asked: Asked, strengths: Sequence[float], ks: Sequence[int], layers: Sequence[int]
) -> Method:
    """A method with its grid.

    `plain` answers greedily without a profile, `rag` with it, `prompt` with a description in its place. `stylevector`
    and `steerx` add their vector without a profile, `lora` adds a trained change to the weights; `rag+stylevector` and
    the like do so with the profile. Rules that have no
    strength (`dola`, entropy γ) have no grid of strengths.

    Raises:
        EvaluationError: the method is unknown, or lacks its heads.
    """
    rule_name, family = (asked, None) if isinstance(asked, str) else asked
    rule, shows, vector = GREEDY, _SHOWN.get(rule_name, "own"), VECTORS.get(rule_name.removeprefix("rag+"))
    if vector:
        shows = "own" if rule_name.startswith("rag+") else "none"
        rule, rule_name = find_rule("vector"), "vector"
    elif rule_name not in _SHOWN:
        rule = find_rule(rule_name)
        if rule.vector:
            raise EvaluationError(f"evaluate: method {name!r}: ask for {', '.join(VECTORS)}, or 'rag+stylevector'")
    if rule.needs_heads != (family is not None):
        wanted = "needs heads, such as ('dps', scores)" if rule.needs_heads else "takes no heads"
        raise EvaluationError(f"evaluate: method {name!r} {wanted}")
    adapter = rule_name.removeprefix("rag+") == LORA
    grid: list[Setting] = [Setting()]
    if adapter or rule.prompt or (rule.edits and not rule.adaptive):
        grid = [Setting(strength) for strength in strengths]
    elif rule.adaptive:
        grid = [Setting(1.0)]
    if rule.needs_heads:
        grid = [Setting(one.strength, k) for one in grid for k in ks]
    if rule.vector:
        grid = [Setting(one.strength, None, layer) for one in grid for layer in layers]
    return Method(name, rule, rule_name, shows, family, tuple(grid), vector, adapter)


@dataclass(frozen=True)
class Row:
    """One method with one setting, ready to be written by."""

    method: Method
    setting: Setting
    heads: HeadSet
    vector: SteeringVector | None = None
    adapter: UserLora | None = None


def write(
    model: HookedModel,
    prompts: Mapping[str, Prompt],
    rows: Sequence[Row],
    max_new_tokens: int,
    stop_at_eos: bool = True,
) -> list[Int[Tensor, " _"]]:
    """The answers of one example by every row, in order: greedily, by one decoding loop.

    Args:
        model: a hooked model.
        prompts: by what they show.
        rows: methods with settings.
        max_new_tokens: of an answer.
        stop_at_eos: end an answer at the model's end token.
    """
    found: dict[int, Tensor] = {}
    calls: dict[tuple[str, str, int | None], list[int]] = {}
    for index, row in enumerate(rows):
        # Every adapter is a model of its own.
        calls.setdefault((*row.method.call, index if row.adapter else None), []).append(index)
    for (rule_name, shows, _), members in calls.items():
        chosen = [rows[index] for index in members]
        rule, strengths = chosen[0].method.rule, [row.setting.strength for row in chosen]
        options: dict[str, Any] = {"rule": rule_name} if rule_name else {"heads": HeadSet(), "gamma": 0.0}
        if rule.edits:
            options["gamma"] = strengths
        if rule.needs_heads:
            options["heads"] = [row.heads for row in chosen]
        if rule.vector:
            options["vectors"] = [row.vector for row in chosen]
        if rule.prompt:
            options |= {"alpha": strengths, "without": [prompts["none"]] * len(chosen)}
        options |= {"max_new_tokens": max_new_tokens, "stop_at_eos": stop_at_eos}
        adapter = chosen[0].adapter
        with adapter.on(model, strengths[0]) if adapter else nullcontext():
            written: Any = generate(model, [prompts[shows]] * len(chosen), **options)
        found |= dict(zip(members, written.tokens, strict=True))
    return [found[index] for index in range(len(rows))]


def describe(methods: Mapping[str, Method]) -> dict[str, Any]:
    """Grid and rule of every method, for a manifest."""
    return {
        name: {
            "rule": method.rule_name,
            "shows": method.shows,
            "vector": method.vector,
            "adapter": [RANK, EPOCHS, LEARNING_RATE, SEED] if method.adapter else None,
            "grid": [str(one) for one in method.settings],
        }
        for name, method in methods.items()
    }
