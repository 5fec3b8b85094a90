"""Rules of decoding by name, and what a rule needs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from dps_lens.checks import check_number
from dps_lens.errors import SteeringError
from dps_lens.extensions import settings_of
from dps_lens.intervene import AblationLike, Patch, find_ablation
from dps_lens.steering.terms import Branch, DivergenceTerm, EarlyTerm, EntropyTerm, InPlaceTerm, Term

S = TypeVar("S")

_SHIFTED: frozenset[Branch] = frozenset({"shifted", "heads_shifted"})
_IN_PLACE: frozenset[Branch] = _SHIFTED | {"scaled"}


@dataclass(frozen=True)
class Rule:
    """A tuple of terms.

    Attributes:
        name: as it was asked for.
        terms: one a branch.
        min_p: tokens that are ruled out while text is written, where nothing stricter is asked for.
    """

    name: str
    terms: tuple[Term, ...]
    min_p: float | None = None

    def settings(self) -> Any:
        """The name; where terms are somebody's own, with their fields, for a manifest."""
        known = [term for part in self.name.split("+") if part in RULES for term in RULES[part].terms]
        if [*self.terms] == known:
            return self.name
        return {"name": self.name, "terms": [settings_of(type(term).__name__, term) for term in self.terms]}

    def has(self, *branches: Branch) -> bool:
        """Whether it looks at one of these branches."""
        return any(term.branch in branches for term in self.terms)

    @property
    def in_place(self) -> Term | None:
        """The term that changes what is written from, with strength γ, if any."""
        return self._first(_IN_PLACE)

    @property
    def ablating(self) -> Term | None:
        """The term that contrasts with the model without heads, if any."""
        return self._first({"ablated"})

    def _first(self, branches: Collection[Branch]) -> Term | None:
        return next((term for term in self.terms if term.branch in branches), None)

    @property
    def takes_gamma(self) -> bool:
        return self.in_place is not None or self.ablating is not None

    @property
    def takes_alpha(self) -> bool:
        return any(self.by_alpha(term) for term in self.terms)

    def by_alpha(self, term: Term) -> bool:
        """The strength of a term is α: it contrasts prompts, or is beside a vector, which has γ."""
        return term.branch == "negative" or (term is not self.in_place and self.in_place is not None)

    def given(self, gamma: S, alpha: S, cap: float) -> dict[Branch, S | float]:
        """The strength of every term by its branch.

        Args:
            gamma: of edited branches.
            alpha: of the others.
            cap: of strengths that every step finds.
        """

        def of(term: Term) -> S | float:
            if term.adaptive:
                return cap
            if term.branch == "early" and not self.alone:
                return 1.0
            return alpha if self.by_alpha(term) else gamma

        return {term.branch: of(term) for term in self.terms}

    @property
    def needs_heads(self) -> bool:
        return self.has("ablated", "scaled")

    @property
    def needs_vectors(self) -> bool:
        return self.has(*_SHIFTED)

    @property
    def patched(self) -> bool:
        """Heads get the z of the run with the negative prompt."""
        term = self.ablating
        return term is not None and term.ablation is not None and isinstance(find_ablation(term.ablation), Patch)

    @property
    def needs_negative(self) -> bool:
        return self.has("negative") or self.patched

    @property
    def alone(self) -> bool:
        """A model that is changed in place is what is written from; the full model does not run."""
        return self.in_place is not None

    @property
    def adaptive(self) -> bool:
        """Some strength is found at every step."""
        return any(term.adaptive for term in self.terms)


RuleLike: TypeAlias = str | Term | Sequence[Term] | Rule
"""A rule by name, two stacked (`"dps+cad"`, `"head_vector+dps"`), a term of your own, or several."""

RULES = {
    rule.name: rule
    for rule in (
        Rule("dps", (Term("ablated"),)),
        Rule("dps-entropy", (EntropyTerm("ablated"),)),
        Rule("dps-js", (DivergenceTerm("ablated"),)),
        Rule("dps-patch", (Term("ablated", ablation="patch"),)),
        Rule("decore", (EntropyTerm("ablated", ablation="uniform"),)),
        Rule("cad", (Term("negative"),)),
        Rule("cos", (Term("negative"),)),
        Rule("adacad", (DivergenceTerm("negative"),)),
        Rule("dola", (EarlyTerm(),), min_p=0.1),
        Rule("amplify", (InPlaceTerm("scaled"),)),
        Rule("vector", (InPlaceTerm("shifted"),)),
        Rule("head_vector", (InPlaceTerm("heads_shifted"),)),
        Rule("greedy", ()),
    )
}


def find_rule(asked: RuleLike) -> Rule:
    """A rule, checked.

    Raises:
        SteeringError: a name is unknown, or the terms do not stack.
    """
    if isinstance(asked, Rule):
        return asked
    if isinstance(asked, Term):
        return Rule(type(asked).__name__, (asked,))
    if isinstance(asked, str):
        parts = asked.split("+")
        for part in parts:
            if part not in RULES:
                raise SteeringError(
                    f"rule {part!r} is unknown; use one of {', '.join(RULES)}, 'dps+cad', or a Term of your own"
                )
        if len(parts) == 1:
            return RULES[asked]
        terms = tuple(term for part in parts for term in RULES[part].terms)
    else:
        terms, asked = tuple(asked), "+".join(type(term).__name__ for term in asked)
    branches = {term.branch for term in terms}
    of_heads, contrasts = branches & (_IN_PLACE | {"ablated"}), branches & {"ablated", "negative", "early"}
    two = len(terms) == len(branches) == 2
    if not (two and ((of_heads and "negative" in branches) or (branches & _SHIFTED and contrasts))):
        raise SteeringError(
            f"{asked!r} does not stack; give one rule of heads or vectors and one of prompts, 'dps+cad', or one of "
            "vectors and any contrast, 'head_vector+dps'"
        )
    return Rule(asked, terms, RULES["dola"].min_p if EarlyTerm() in terms else None)


def check_patch(call: str, ablation: AblationLike | None) -> None:
    """Refuse a patch from another run than that of the negative prompt.

    Raises:
        SteeringError: names the call.
    """
    patch = find_ablation(ablation) if ablation is not None else None
    if isinstance(patch, Patch) and (patch.z is not None or patch.direction != "noising"):
        raise SteeringError(f"{call}: rules patch z from the negative prompt's run; use Patch() as it is")


def apart(asked: Any) -> tuple[RuleLike, Any]:
    """A rule and what stands beside it, as in `("dps", scores)`; a tuple of terms is a rule."""
    if isinstance(asked, tuple) and len(asked) == 2 and not isinstance(asked[1], Term):
        return asked[0], asked[1]
    return asked, None


def check_strength(name: str, value: float) -> None:
    """Refuse a γ below −1 (the ablated model), an α below 0, and what is not a number.

    Raises:
        SteeringError: names the value.
    """
    least = {"gamma": -1, "alpha": 0}[name]
    check_number(SteeringError, name, value, least=least)
