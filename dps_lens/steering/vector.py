"""A direction in the residual stream, added while the answer is written."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from dps_lens.errors import SteeringError
from dps_lens.model import HookedModel
from dps_lens.result import Result

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False, repr=False)
class SteeringVector(Result):
    """A direction that `generate(rule="vector", vectors=…)` adds, times γ.

    Attributes:
        values: `Float[Tensor, "d_model"]`.
        layer: it is added to the residual stream that leaves this layer, from the last prompt token on.
        label: what the vector is called.
        manifest: how it was made.
    """

    stem: ClassVar[str] = "vector"
    error: ClassVar[type[SteeringError]] = SteeringError

    values: Float[Tensor, " d_model"]
    layer: int
    label: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        return f"{self.label or 'vector'} at layer {self.layer}, norm {float(self.values.norm()):.3g}"

    def to_frame(self) -> "pandas.DataFrame":
        """One row a dimension: `dimension`, `value`."""
        import pandas as pd

        return pd.DataFrame({"dimension": range(len(self.values)), "value": self.values.tolist()})

    def check(self, call: str, model: HookedModel) -> None:
        """Refuse a model that this is not a direction of.

        Raises:
            SteeringError: its layer or width is another; names the call.
        """
        if not 0 <= self.layer < model.cfg.n_layers or self.values.shape != (model.cfg.d_model,):
            raise SteeringError(
                f"{call}: a vector {list(self.values.shape)} at layer {self.layer} is not of this model, "
                f"[{model.cfg.d_model}] in {model.cfg.n_layers} layers"
            )
