"""Work on users' examples, one unit each."""

from abc import abstractmethod
from functools import cached_property

from dps_lens.data import Example
from dps_lens.data.examples import by_key
from dps_lens.model import HookedModel, Runner, runner_of
from dps_lens.work import Work


class ExampleWork(Work):
    """Work whose units are examples.

    Attributes:
        model: that runs them.
    """

    model: HookedModel

    @property
    @abstractmethod
    def examples(self) -> list[Example]:
        """User by user."""

    @cached_property
    def by_key(self) -> dict[str, Example]:
        """The examples by the keys of their units."""
        return by_key(self.examples)

    @cached_property
    def runner(self) -> Runner:
        return runner_of(self.model)

    def owner(self, key: str) -> str:
        return self.by_key[key].user_id
