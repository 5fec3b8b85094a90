"""A run in shards: jobs that know nothing of each other, and their folders put together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dps_lens.data.examples import key_of
from dps_lens.errors import RunError
from dps_lens.runs import RunFolder, changes, read_manifest
from dps_lens.scores import HeadScores
from dps_lens.work import Engine, Unit, Work


@dataclass(frozen=True)
class Shard(Engine):
    """Makes the units of every `count`-th user, in this process.

    The result is that of these users. Each shard has a run folder of its own; `merge_runs` puts them together. What all
    units depend on (means of z, settings chosen on discovery examples, reference families) every shard makes whole.

    Args:
        index: 1 to `count`.
        count: number of shards.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise RunError(
                f"Shard: {self} is none; shards of {self.count} are 1/{self.count} to {self.count}/{self.count}"
            )

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Of `"2/8"`.

        Raises:
            RunError: the text is none.
        """
        try:
            index, count = map(int, text.split("/"))
        except ValueError as error:
            raise RunError(f"Shard: {text!r} is none; write the second of eight as 2/8") from error
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def share(self, work: Work, keys: Sequence[str]) -> Sequence[str]:
        owners = list(dict.fromkeys(map(work.owner, keys)))
        mine = set(owners[self.index - 1 :: self.count])
        share = [key for key in keys if work.owner(key) in mine]
        if not share:
            raise RunError(f"Shard: {self} has nothing to do, there are only {len(owners)} users; use fewer shards")
        return share

    def make(self, work: Work, keys: Sequence[str], folder: Path | None) -> Iterator[tuple[str, Unit]]:
        return ((key, work.make(key, work.given(key))) for key in keys)

    def note(self, manifest: dict[str, Any]) -> None:
        manifest["shard"] = str(self)


def merge_runs(parts: Sequence[str | Path], out: str | Path) -> int:
    """Put the units of shards into one run folder.

    Scores are there at once. Other runs are finished by the same call once more, with this folder and without a
    shard: it computes nothing that is there.

    Args:
        parts: run folders.
        out: a folder that is empty, absent, or of the same run.

    Returns:
        number of units in `out`.

    Raises:
        RunError: a folder is no run, or one of other settings than the first.
    """
    if not parts:
        raise RunError("merge_runs: give at least one run folder")
    manifests = [_manifest(Path(part)) for part in parts]
    for part, manifest in zip(parts, manifests, strict=True):
        changed = [name for name, _, _ in changes(manifest, manifests[0])]
        if changed:
            raise RunError(f"merge_runs: {part} is of another run than {parts[0]}: {', '.join(changed)[:200]} differ")
    folder = RunFolder(out, manifests[0])
    for part in parts:
        folder.adopt(Path(part))
    if manifests[0].get("call") == "score_heads":
        examples = manifests[0].get("examples")
        if not isinstance(examples, list) or not all(isinstance(one, str) for one in examples):
            raise RunError(f"merge_runs: {parts[0]} does not say which examples its run has; make it anew")
        _merged([_scores(Path(part), manifests[0]) for part in parts], examples).save(folder.path)
    return folder.n_units


def _manifest(part: Path) -> dict[str, Any]:
    try:
        return read_manifest(part)
    except RunError as error:
        raise RunError(f"merge_runs: {part} is no run folder ({error})") from error


def _scores(part: Path, manifest: Mapping[str, Any]) -> HeadScores:
    """The scores of a shard, which were made in the run that its folder holds."""
    scores = HeadScores.load(part)
    own = {name: scores.manifest.get(name) for name in manifest}
    for name, _, _ in changes(own, manifest):
        raise RunError(f"merge_runs: the scores in {part} are of another run than its units: {name} differs")
    return scores


def _merged(parts: Sequence[HeadScores], examples: Sequence[str]) -> HeadScores:
    """The scores of all shards, in the order of the run without shards."""
    manifest = {name: value for name, value in parts[0].manifest.items() if name not in ("shard", "quarantined")}
    quarantined = {key: reason for part in parts for key, reason in part.manifest.get("quarantined", {}).items()}
    whole = HeadScores.join(parts)
    place = {key: index for index, key in enumerate(examples)}
    keys = [key_of(*row) for row in zip(whole.user_ids, whole.example_ids, strict=True)]
    if foreign := [key for key in keys if key not in place]:
        raise RunError(f"merge_runs: example {foreign[0]!r} is not of this run")
    merged = whole.take(sorted(range(len(keys)), key=lambda row: place[keys[row]]))
    if missing := len(examples) - len(merged.example_ids) - len(quarantined):
        shards = ", ".join(str(part.manifest.get("shard", "all")) for part in parts)
        raise RunError(f"merge_runs: {missing} of {len(examples)} examples are missing; these are shards {shards}")
    return replace(merged, manifest=manifest | ({"quarantined": quarantined} if quarantined else {}))
