"""Long work in units, each made from its key: here, or wherever an engine makes it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar
from warnings import warn

from torch import Tensor

from dps_lens.checks import check_flag, check_whole
from dps_lens.errors import RunError
from dps_lens.model import HookedModel, has_hooks
from dps_lens.progress import progress_bar, showing_steps
from dps_lens.result import Result, provenance
from dps_lens.runs import RunFolder, is_run

BatchSize: TypeAlias = int | Literal["auto"]
R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class RunConfig:
    """How a long call is carried out; none of it changes a number.

    Attributes:
        force: drop what the run folder holds.
        batch_size: rows of a batch; `"auto"` chooses by device.
        progress: show progress: bars in a terminal or a notebook, and now and then a line in a log file.
    """

    force: bool = False
    batch_size: BatchSize = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("force", "progress"):
            check_flag(RunError, f"RunConfig: {name}", getattr(self, name))
        if self.batch_size != "auto":
            check_whole(RunError, "RunConfig: batch_size", self.batch_size, least=1, why="or 'auto'")


class Work(ABC):
    """A run that falls into units, each made from its key, on this machine or another.

    Subclasses are dataclasses. Their fields travel; `model` does not, every machine loads it for itself.
    """

    model: HookedModel

    def given(self, key: str) -> Any:
        """What a unit needs of units that were made before; it travels with the key."""
        return None

    def owner(self, key: str) -> str:
        """Units of one owner belong into one shard."""
        return key

    @abstractmethod
    def make(self, key: str, given: object = None) -> dict[str, Tensor]:
        """One unit."""

    def __getstate__(self) -> dict[str, Any]:
        names = {one.name for one in fields(self)} - {"model"}  # type: ignore[arg-type]
        return {name: value for name, value in vars(self).items() if name in names}


@dataclass(frozen=True)
class Failure:
    """A unit that was given up, with its traceback."""

    error: str

    @property
    def reason(self) -> str:
        """The last line."""
        return self.error.strip().splitlines()[-1]


Unit: TypeAlias = dict[str, Tensor] | Failure


class Engine(ABC):
    """Where units are made; without one, here and in order."""

    status: str = ""
    """Beside the progress bar."""

    def start(self, model: HookedModel) -> None:  # noqa: B027
        """Be ready for work on this model; called before its description is asked for."""

    def share(self, work: Work, keys: Sequence[str]) -> Sequence[str]:
        """The keys that are made in this run."""
        return keys

    @abstractmethod
    def make(self, work: Work, keys: Sequence[str], folder: Path | None) -> Iterator[tuple[str, Unit]]:
        """Units as they are finished."""

    def note(self, manifest: dict[str, Any]) -> None:  # noqa: B027
        """Say in a manifest what this engine leaves out."""


@dataclass
class Units:
    """The units of a run, in the order of their keys, and those that were given up: key → reason."""

    made: dict[str, dict[str, Tensor]]
    quarantined: dict[str, str] = field(default_factory=dict)


def make_units(
    work: Work,
    keys: Sequence[str],
    *,
    folder: RunFolder | None = None,
    engine: Engine | None = None,
    what: str = "units",
    unit: str = "example",
    split: bool = True,
    progress: bool = True,
) -> Units:
    """Make units that are not in the folder yet, here or on an engine, and keep each as soon as it is there.

    Args:
        work: makes them.
        keys: which.
        folder: where they are kept, if anywhere.
        engine: who makes them.
        what: on the progress bar.
        unit: on the progress bar.
        split: a shard makes its part only; else all of them.
        progress: show a progress bar.

    Raises:
        RunError: not one unit could be made.
    """
    if not keys:
        return Units({})
    if engine is not None and split:
        keys = engine.share(work, keys)
    made = {key: kept for key in keys if folder is not None and (kept := folder.get(key)) is not None}
    missing = [key for key in keys if key not in made]
    if engine is None:
        source: Iterator[tuple[str, Unit]] = ((key, work.make(key, work.given(key))) for key in missing)
    else:
        source = engine.make(work, missing, folder.path if folder else None)
    quarantined: dict[str, str] = {}
    bars = progress_bar(total=len(keys), initial=len(made), desc=what, unit=unit, shown=progress)
    with bars as bar, showing_steps(progress and engine is None):
        for key, one in source:
            if isinstance(one, Failure):
                quarantined[key] = one.reason
                place = f"; its traceback is in {folder.quarantine(key, one.error)}" if folder else ""
                warn(f"unit {key!r} was given up: {one.reason}{place}", stacklevel=3)
            else:
                if folder:
                    folder.put(key, one)
                made[key] = one
            if engine is not None:
                bar.set_postfix_str(engine.status, refresh=False)
            bar.update()
    if quarantined and not made:
        raise RunError(f"{what}: every unit was given up, the first because of {next(iter(quarantined.values()))}")
    return Units({key: made[key] for key in keys if key in made}, quarantined)


class Run:
    """One long call: where its units are kept, who makes them, and what its result says of that.

    Args:
        model: an engine gets ready for it.
        result: what the call returns.
        out: a run folder, if any.
        engine: who makes units; here and in order without one.
        config: how it is carried out.

    Attributes:
        manifest: of the result: settings, provenance, what was given up or left to other shards.
    """

    def __init__(
        self,
        model: HookedModel,
        result: type[Result] | None = None,
        out: str | Path | None = None,
        engine: Engine | None = None,
        config: RunConfig | None = None,
    ) -> None:
        if engine is not None:
            engine.start(model)
        self.config, self.engine = config or RunConfig(), engine
        self._model, self._result, self._out = model, result, out
        self._folder: RunFolder | None = None
        self.manifest: dict[str, Any] = {}

    def open(self, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Open the folder for results of these settings.

        Args:
            describe: gives the fingerprint; asked again when the result is kept, for a model may be edited, and the
                date that a chat template writes may change, while units are made.

        Raises:
            RunError: it holds a run with other settings, a result of no run, or the model has hooks.
        """
        fingerprint, self._describe = describe(), describe
        if self._out is not None:
            self._check_out(Path(self._out))
            self._folder = RunFolder(self._out, fingerprint, force=self.config.force)
            if self.config.force and self._result is not None:
                self._result.remove(self._out)
        self.manifest = {**fingerprint, "made": self._folder.made if self._folder else provenance()}

    def _check_out(self, out: Path) -> None:
        if has_hooks(self._model):
            raise RunError(f"{out}: the model has hooks, which a run folder cannot describe; remove them, or leave out")
        result = self._result
        if result is not None and not self.config.force and not is_run(out) and (out / f"{result.stem}.json").exists():
            raise RunError(
                f"{out} holds a {result.__name__} that no run was kept of and that would be overwritten; use another "
                "folder, or --force to drop it"
            )

    def units(
        self,
        work: Work,
        keys: Sequence[str],
        what: str,
        *,
        unit: str = "example",
        split: bool = True,
        keep: bool = True,
    ) -> Units:
        """`make_units` in this run; `keep=False` makes them anew each time."""
        folder = self._folder if keep else None
        options: dict[str, Any] = {"unit": unit, "split": split, "progress": self.config.progress}
        units = make_units(work, keys, folder=folder, engine=self.engine, what=what, **options)
        if units.quarantined:
            self.manifest.setdefault("quarantined", {}).update(units.quarantined)
        if self.engine is not None:
            self.engine.note(self.manifest)
        return units

    def keep(self, result: R) -> R:
        """The result, saved where there is a folder.

        Raises:
            RunError: what decides it has changed since the run was opened.
        """
        if self._out is not None and self._folder is not None:
            self._folder.check(self._describe())
            result.save(self._out)
        return result
