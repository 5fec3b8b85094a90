"""Damaged and hostile files for every reader: each is refused in one sentence, or read as it was written.

`PYTHONPATH=.:tests python tests/fuzz.py --inputs 5000 --seed 1` tries so many and prints what went wrong; `--first`
and `--only` narrow it to some of them. An input is made from its seed and number alone.
"""

import argparse
import json
import random
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import dps_lens as dps
from dps_lens.cli.config import read_config
from dps_lens.cli.requests import Lines, Request, read_requests
from dps_lens.data import Prompt
from dps_lens.data.examples import key_of
from dps_lens.data.fetch import _check as check_fetched
from dps_lens.data.tasks import TASKS
from dps_lens.errors import DPSLensError
from dps_lens.evaluation import Evaluation, SteeringGrid, Verdicts
from dps_lens.evaluation.endpoint import _digest as answer_digest
from dps_lens.evaluation.endpoint import _kept as kept_answer
from dps_lens.evaluation.grid import SteeredText
from dps_lens.evaluation.judge import CRITERIA, read_reply
from dps_lens.evaluation.sweep import SteeringSweep
from dps_lens.heads import Head, HeadSet
from dps_lens.result import Result
from dps_lens.runs import RunFolder
from dps_lens.steering import Generation, SteeringVector
from dps_lens.steering.rules import find_rule
from dps_lens.validation.attention import AttentionPattern
from dps_lens.validation.effects import SetEffects

SECONDS = 10
RAW = (
    "1e999", "-1e999", "NaN", "-Infinity", "1" * 5000, "-0", "1.0", "0", "-1", "true", "null", '""', "[]", "{}",
    '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"L999999999H999999999"', '"L' + "9" * 5000 + 'H0"', "[[[]]]",
    '{"a": 1, "a": 2}', "[" * 100_000 + "]" * 100_000, '{"a":' * 20_000 + "1" + "}" * 20_000, '"' + "x" * 100_000 + '"',
    '{"$": "tensor", "name": "values"}', '{"$": "tuple", "items": 3}', '{"$": "nothing"}', '{"$": []}',
    '{"$": "frame", "data": [1], "columns": "ab"}', '{"$": "heads", "names": 3, "label": [], "shape": "ab"}',
    "99999999999999999999", '"2021-13-45"', '"<b>%{x}</b>"', '"/"', '"' + "a/" * 3000 + '"', "1e400", '[NaN]',
)  # fmt: skip
"""JSON texts that stand where something else stood."""

CHUNKS = (
    b"", b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b\x08", b"PK\x03\x04", b"\n", b"\r\n", b"\\ud800",
    b"{", b"]", b",", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"&a [*a, *a]", b"!!python/object/apply:os.abort []", b": - ? ",
    b"!!timestamp 2001-99-99", b"<<: *x", b".nan", b"1_0", b"0o9", b"!!binary x", b"%YAML 9.9\n---\n", b"\t", b"#",
)  # fmt: skip
"""Bytes that are put in."""


class Hang(BaseException):
    """An input took too long."""


@dataclass
class Target:
    """A reader with files that it reads.

    Attributes:
        name: of the target.
        files: name → content.
        read: takes the folder; what it returns is compared where there is a digest.
        signed: what is accepted, if the digest is still there, must be what the whole files give, or None.
    """

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], Any]
    signed: bool = False
    others: tuple[str, ...] = field(default=())


# What is read


def docs() -> bytes:
    records = [
        {"user_id": f"u{user}", "id": f"d{n}", "title": f"Title {n}", "text": f"A text, {n}.", "date": f"2020-01-0{n}"}
        for user in range(2)
        for n in range(1, 7)
    ]  # fmt: skip
    return "\n".join(map(json.dumps, records)).encode()


def lamp() -> dict[str, bytes]:
    profile = [
        {"id": f"p{n}", "title": f"Title {n}", "text": f"Text {n}.", "date": f"2020-0{n}-01"} for n in range(1, 5)
    ]
    asked = "Generate a headline for the following article: It rained."
    questions = [{"id": f"{n}", "input": asked, "profile": profile, "user_id": f"u{n}"} for n in range(2)]
    golds = [{"id": f"{n}", "output": "Rain"} for n in range(2)]
    return {
        "dev_questions.json": json.dumps(questions).encode(),
        "dev_outputs.json": json.dumps({"task": "LaMP_4", "golds": golds}).encode(),
    }


def topics() -> bytes:
    profile = [{"id": f"p{n}", "author": "a", "content": f"Content {n}.", "summary": f"Sum {n}"} for n in range(4)]
    asked = 'Write the text titled "Rain".'
    return "\n".join(
        json.dumps({"author": f"a{n}", "input": asked, "output": "It rained.", "profile": profile}) for n in range(2)
    ).encode()


def users(folder: Path) -> Any:
    """Loads, and does with the users what every call does first."""
    (file,) = [path for path in folder.iterdir() if "outputs" not in path.name]
    loaded = dps.load_users(file)
    return [(repr(user), [example.reference for example in user.discovery_examples()]) for user in loaded]


def results() -> Iterator[tuple[Result, str]]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 2, 3, generator=generator)
    ids, owners = [f"e{n}" for n in range(6)], [f"u{n // 2}" for n in range(6)]
    nll = {"own": torch.rand(6, generator=generator)}
    scores = dps.HeadScores(
        values, example_ids=ids, user_ids=owners, components={"own": values}, nll=nll, manifest={"seed": 0}
    )
    yield scores, "scores"
    yield dps.overlap(scores, k=2, n_null=10, n_splits=3), "overlap"
    ones = torch.rand(6, 2, dtype=torch.float64, generator=generator)
    both = {name: ones for name in ("own", "no_profile")}
    yield SetEffects(
        ("heads",), (2,), tuple(owners), tuple(ids), both,
        {name: each[:, None, None] for name, each in both.items()},
        {name: each[None, :3, None, None] for name, each in both.items()},
        {"sets": {"heads": "L0H0,L1H1"}, "seed": 0},
    ), "effects"  # fmt: skip
    rows = pd.DataFrame(
        {"user": owners, "example": ids, "method": "rag", "text": "t", "reference": "r", "NLL": nll["own"]}
    )
    yield Evaluation(rows, rows[:1], pd.DataFrame(), TASKS["lamp-4"], {"metrics": ["ROUGE-L"]}), "evaluation"
    text = SteeredText("u0", "e0", 1.0, 2, "L0H0", "t", ["t"], [0.1], [None], [[("a", 0.1)]], {"style": 0.5})
    yield SteeringGrid((text,), (1.0,), (2,), {"e0": "r"}, {"rule": "dps"}), "grid"
    change = {"dps": torch.rand(1, 6, dtype=torch.float64, generator=generator)}
    yield SteeringSweep((1.0,), tuple(owners), tuple(ids), nll["own"].double(), change, change), "steering"
    two = torch.rand(2, generator=generator)
    yield (
        Generation(["ab"], [torch.tensor([1, 2])], [two], [two], [two], [["a", "b"]], manifest={"rule": "dps"}),
        "generation",
    )
    verdicts = pd.DataFrame({"user": owners, "example": ids, "method": "rag", "criterion": "style", "verdict": 1.0})
    yield Verdicts(verdicts, 0, {"judge": "j"}), "verdicts"
    yield SteeringVector(two, 1, "v", {"seed": 0}), "vector"
    spans = {"profile": (0, 2), "task": (2, 3), "response": (3, 5)}
    prompt = Prompt(torch.arange(5), spans, "t", "own", "e", "u", ("d",))
    yield AttentionPattern((Head(0, 0),), torch.rand(1, 2, 5, generator=generator), tuple("abcde"), prompt), "attention"


def saved(result: Result, *, signed: bool = True) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        result.save(name)
        files = {path.name: path.read_bytes() for path in Path(name).iterdir()}
    if not signed:
        file = next(one for one in files if one.endswith(".json"))
        meta = json.loads(files[file])
        del meta["digest"]
        files[file] = json.dumps(meta).encode()
    return files


def content(kind: type[Result], folder: Path) -> Any:
    """What a loaded result holds, as text."""
    loaded = kind.load(folder)
    repr(loaded)
    with tempfile.TemporaryDirectory() as name:
        loaded.save(name)
        return {path.name: comparable(path) for path in Path(name).iterdir()}


def comparable(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return path.read_bytes()
    return json.dumps({key: value for key, value in json.loads(path.read_bytes()).items() if key != "digest"})


EXAMPLES = [key_of(f"u{n // 2}", f"e{n}") for n in range(6)]
FINGERPRINT = {"call": "score_heads", "ks": [1, 2], "examples": EXAMPLES, "model": {"name": "m"}}


def run_files(scores: dps.HeadScores) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(name, FINGERPRINT)
        folder.put("a", {"values": torch.arange(4.0)})
        replace(scores, manifest=FINGERPRINT).save(name)
        return {str(path.relative_to(name)): path.read_bytes() for path in Path(name).rglob("*") if path.is_file()}


def run_folder(folder: Path) -> Any:
    run = RunFolder(folder, FINGERPRINT)
    run.made  # noqa: B018
    unit = run.get("a")
    return None if unit is None else {name: one.tolist() for name, one in unit.items()}


def merged(folder: Path) -> Any:
    with tempfile.TemporaryDirectory() as name:
        dps.merge_runs([folder], Path(name) / "out")
        return content(dps.HeadScores, Path(name) / "out")


RULE, DEFAULTS = find_rule("dps"), {"heads": "L0H0", "gamma": 1.0, "alpha": 0.5, "do_sample": False,
                                    "temperature": 1.0, "top_k": None, "top_p": None, "seed": 0}  # fmt: skip
REQUESTS = [Request({"line": n, "prompt": f"p{n}"}, f"p{n}", settings=DEFAULTS) for n in range(3)]
ASKED = {"model": "m", "messages": [{"role": "user", "content": "?"}], "temperature": 0, "max_tokens": 8}


def requests(folder: Path) -> Any:
    people = dps.load_users("probe", max_users=1)
    return [repr(one) for one in read_requests(folder / "requests.jsonl", people, DEFAULTS, RULE)]


def lines(folder: Path) -> Any:
    return Lines(folder / "out.jsonl", REQUESTS, {"model": "m"}).done


def config(folder: Path) -> Any:
    return read_config(folder / "config.yaml", {}).as_yaml()


def reply(folder: Path) -> Any:
    return read_reply((folder / "reply").read_bytes().decode("utf-8", "replace"), CRITERIA)


def heads(folder: Path) -> Any:
    return str(HeadSet.parse((folder / "heads").read_bytes().decode("utf-8", "replace")))


def targets() -> list[Target]:
    made = list(results())
    asked = [{"prompt": "Hello", "gamma": 2.0, "id": "a"}, {"user": "probe", "heads": "L1H2", "seed": 3, "top_k": None}]
    asked[1]["user"] = dps.load_users("probe", max_users=1)[0].id
    written = [
        json.dumps({**one.about, "model": "m", **DEFAULTS, "plain": "x", "steered": "y"}) for one in REQUESTS[:2]
    ]
    answer = {"request": ASKED, "answer": "fine", "digest": answer_digest("fine"), "usage": {"total_tokens": 3}}
    settings = "model: m\nstrengths: [0.25, 0.5]\nks: [10]\nmethods: [rag, cad]\nmax_users: 3\nrun: runs/a\nseed: 1\n"
    run = run_files(made[0][0])
    return [
        Target("documents", {"docs.jsonl": docs()}, users),
        Target("lamp", lamp(), users),
        Target("longlamp", {"topics.jsonl": topics()}, users),
        *(Target(name, saved(one), partial(content, type(one)), signed=True) for one, name in made),
        *(Target(f"{name}, unsigned", saved(one, signed=False), type(one).load) for one, name in made),
        Target("run", run, run_folder, signed=True),
        Target("merge", run, merged),
        Target("requests", {"requests.jsonl": "\n".join(map(json.dumps, asked)).encode()}, requests),
        Target("lines", {"out.jsonl": ("\n".join(written) + "\n").encode()}, lines),
        Target("config", {"config.yaml": settings.encode()}, config),
        Target("reply", {"reply": json.dumps(dict.fromkeys(CRITERIA, "A")).encode()}, reply),
        Target("answer", {"a.json": json.dumps(answer).encode()}, lambda at: kept_answer(at / "a.json", ASKED)),
        Target("fetched", {"f": lamp()["dev_questions.json"]}, lambda at: check_fetched(at / "f")),
        Target("heads", {"heads": b"L0H1, L2H3"}, heads),
    ]


# What is done to it


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three changes of a file."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice((flip, cut, splice, put_in, in_tree, in_tree, in_tree, in_header))
        data = change(data, rng)
    return data


def flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    found = bytearray(data)
    found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut(data: bytes, rng: random.Random) -> bytes:
    start, stop = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return rng.choice((data[:start], data[start:], data[:start] + data[stop:]))


def splice(data: bytes, rng: random.Random) -> bytes:
    start, stop, at = (rng.randrange(len(data) + 1) for _ in range(3))
    return data[:at] + data[min(start, stop) : max(start, stop)] + data[at:]


def put_in(data: bytes, rng: random.Random) -> bytes:
    at, chunk = rng.randrange(len(data) + 1), rng.choice((*CHUNKS, *(one.encode() for one in RAW)))
    return data[:at] + chunk + data[at + rng.choice((0, 0, 1, 5)) :]


def in_tree(data: bytes, rng: random.Random) -> bytes:
    """A value of JSON, or of a line of JSON, swapped for another one."""
    try:
        text = data.decode()
        return swapped(text, rng).encode()
    except (ValueError, RecursionError):
        pass
    try:
        rows = data.decode().split("\n")
        at = rng.randrange(len(rows))
        rows[at] = swapped(rows[at], rng)
        return "\n".join(rows).encode()
    except (ValueError, RecursionError):
        return put_in(data, rng)


def swapped(text: str, rng: random.Random) -> str:
    tree = {"": json.loads(text)}
    places = list(nodes(tree))
    holder, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0 and isinstance(holder, dict) and key:
        holder[f"{key}x"] = holder.pop(key)
    elif kind == 1 and key:
        del holder[key]
    elif kind == 2:
        holder[key] = [holder[key]]
    elif kind == 3:
        other, name = rng.choice(places)
        if name in other if isinstance(other, dict) else True:
            holder[key] = json.loads(json.dumps(other[name]))
    elif kind == 4:
        holder[key] = str(holder[key])[:200]
    else:
        holder[key] = "@@"
    return json.dumps(tree[""]).replace('"@@"', rng.choice(RAW))


def nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from nodes(tree[key])


def in_header(data: bytes, rng: random.Random) -> bytes:
    """The header of a tensor file, with its length made to fit, or not."""
    length = int.from_bytes(data[:8], "little")
    if not 8 < length < len(data):
        return flip(data, rng)
    header = in_tree(data[8 : 8 + length], rng)
    said = len(header) if rng.random() < 0.8 else rng.choice((0, 2**63, 2**64 - 1, 10**9, length))
    return said.to_bytes(8, "little") + header + data[8 + length :]


# What comes of it


@contextmanager
def limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def lay(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def tried(target: Target, whole: Any, seed: str, outcomes: Counter) -> str | None:
    """What went wrong with one damaged input, if anything."""
    rng = random.Random(seed)
    files = dict(target.files)
    file = rng.choice(sorted(files))
    files[file] = damaged(files[file], rng)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lay(files, Path(name))
        try:
            with limited():
                found = target.read(Path(name))
        except DPSLensError as error:
            outcomes["refused"] += 1
            text = str(error)
            return None if text and len(text) < 2000 else f"the error is {len(text)} letters long"
        except (Exception, Hang):
            at = [line for line in traceback.format_exc().splitlines() if "/dps_lens/" in line]
            return f"{traceback.format_exc().splitlines()[-1][:200]}\n    {at[-1].strip() if at else ''}"
    outcomes["read"] += 1
    signed = target.signed and all(
        b'"digest"' in files[name] for name, old in target.files.items() if b'"digest"' in old
    )
    if signed and found is not None and found != whole:
        return f"{file} was read, and holds something else"
    return None


def fuzz(n: int, seed: int, first: int = 0, only: str = "") -> tuple[list[str], Counter]:
    """Failures of so many inputs, over all targets in turn, and how often an input was refused or read."""
    chosen = [one for one in targets() if only in one.name]
    wholes = []
    for one in chosen:
        with tempfile.TemporaryDirectory() as name:
            lay(one.files, Path(name))
            wholes.append(one.read(Path(name)))
    failures, outcomes = [], Counter()
    for number in range(first, first + n):
        at = number % len(chosen)
        wrong = tried(chosen[at], wholes[at], f"{seed}|{number}", outcomes)
        if wrong:
            failures.append(f"{chosen[at].name}, input {number} of seed {seed}: {wrong}")
    return failures, outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose names hold this")
    arguments = parser.parse_args()
    failures, outcomes = fuzz(arguments.inputs, arguments.seed, arguments.first, arguments.only)
    kinds = Counter(re.sub(r"input \d+ of seed \d+", "…", one) for one in failures)
    for kind, count in kinds.most_common():
        example = next(one for one in failures if re.sub(r"input \d+ of seed \d+", "…", one) == kind)
        sys.stdout.write(f"{count} × {example}\n")
    sys.stdout.write(f"{arguments.inputs} inputs: {dict(outcomes)}, {len(failures)} failures\n")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
