"""What a server of many users does: each answer checked against a lone run, and the time that it takes.

    python benchmarks/serve.py

A server of the embedded model runs in this process. First, requests of 8 users, each steered by heads of its own, are
answered one after another and all at once, interleaved: the ratio is the throughput of a batch. Then clients ask
without a pause for as long as is asked, whole or streamed, with prompts and answers of mixed lengths, with every kind
of rule, and some go before their answer ends. Every answer has to be the text that `generate` writes for it alone, and
every text that was left its beginning.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import torch

import dps_lens as dps
from dps_lens.data import Document
from dps_lens.data.prompts import conversation_prompt
from dps_lens.heads import HeadSet
from dps_lens.serving import Limits, ModelThread, ProfileStore, Served, SteeringProfile, make_server, model_of

NAME = "served"
_TOPICS = ("bread", "a bicycle", "rain", "the night train", "an old map", "tomatoes", "a letter", "the sea")
_KINDS = ("plain", "dps", "profile", "dps-js", "amplify", "cad", "decore", "capped", "sampled")
_USERS = ("ann", "bob", "eve")
_WORDS = ("and", "then", "it", "was", "so", "late", "that", "nobody", "came")
_LEFT = 0.15


@dataclass
class Case:
    """A request, and what the library writes for it.

    Attributes:
        body: of the request.
        text: that is to come back.
        tokens: of it.
    """

    body: dict[str, Any]
    text: str = ""
    tokens: int = 0


@dataclass
class Seen:
    """What clients saw.

    Attributes:
        whole: answers that were compared.
        left: answers that were left, whose beginnings were compared.
        wrong: cases whose text was another.
        failed: answers of another status, or none.
        first: seconds to the first token of a stream.
        each: seconds between its tokens.
        tokens: that were written.
    """

    whole: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    tokens: int = 0


def cases(
    model: dps.HookedModel,
    n: int,
    *,
    kinds: Sequence[str] = _KINDS,
    tokens: tuple[int, int] = (2, 40),
    words: int = 120,
    seed: int = 0,
) -> list[Case]:
    """Requests of mixed kinds and lengths, with the texts that `generate` writes for each alone."""
    rng = random.Random(seed)
    cfg = model.cfg
    found = []
    for index in range(n):
        kind = kinds[index % len(kinds)]
        topic = _TOPICS[index % len(_TOPICS)]
        note = " ".join(rng.choices([*topic.split(), *_WORDS], k=rng.randint(1, words)))
        messages = [{"role": "user", "content": f"Write about {topic}. Notes: {note}."}]
        heads = HeadSet({(rng.randrange(cfg.n_layers), rng.randrange(cfg.n_heads)) for _ in range(8)})
        length = rng.randint(*tokens)
        documents = [f"I wrote of {topic} before.", f"{topic.capitalize()} is dear to me."]
        body: dict[str, Any] = {"model": NAME, "messages": messages, "max_tokens": length, "temperature": 0}
        options: dict[str, Any] = {"rule": "greedy", "max_new_tokens": length}
        if kind != "plain":
            rule = {"capped": "dps", "sampled": "dps"}.get(kind, kind)
            gamma = rng.choice([0.5, 1.0, 2.0])
            body["dps"] = {"rule": rule, "gamma": gamma}
            options |= {"rule": rule, "gamma": gamma}
            if kind == "profile":
                user = _USERS[index % len(_USERS)]
                body["dps"] = {"user": user}
                options |= {"rule": "dps", "heads": heads_of(model, user), "gamma": 1.0}
            elif rule == "cad":
                body["dps"] = {"rule": rule, "documents": documents}
            else:
                body["dps"]["heads"], options["heads"] = str(heads), heads
            if kind == "capped":
                body["dps"]["max_kl"], options["decode_config"] = 0.1, dps.DecodeConfig(max_kl=0.1)
            if kind == "sampled":
                body |= {"temperature": 0.8, "top_p": 0.9, "seed": index}
                options["sampling"] = dps.Sampling(temperature=0.8, top_p=0.9, seed=index)
        bare = conversation_prompt(model, messages)
        prompt = bare
        if kind == "cad":
            history = [Document(str(at), {"text": text}) for at, text in enumerate(documents)]
            prompt = conversation_prompt(model, messages, history)
            options["negative_prompts"] = bare
        written = dps.generate(model, prompt, **options)
        found.append(Case(body, written.texts[0], len(written.tokens[0])))
    return found


async def ask(client: httpx.AsyncClient, case: Case, seen: Seen, *, stream: bool, leave: bool) -> None:
    """One answer, whole or token by token, perhaps left in the middle."""
    about = json.dumps(case.body.get("dps"))
    try:
        if not stream:
            answer = await client.post("/v1/chat/completions", json=case.body)
            if answer.status_code != 200:
                seen.failed.append(f"{answer.status_code} {answer.text[:200]}")
                return
            text = answer.json()["choices"][0]["message"]["content"]
            seen.tokens += answer.json()["usage"]["completion_tokens"]
        else:
            text, ended = "", False
            begin = before = time.perf_counter()
            async with client.stream("POST", "/v1/chat/completions", json={**case.body, "stream": True}) as answer:
                stop = random.randint(1, 8) if leave else None
                number = 0
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        ended |= line == "data: [DONE]"
                        continue
                    now = time.perf_counter()
                    (seen.first if number == 0 else seen.each).append(now - (begin if number == 0 else before))
                    before, number = now, number + 1
                    piece = json.loads(line[6:])
                    if "error" in piece:
                        seen.failed.append(piece["error"]["message"])
                        return
                    text += piece["choices"][0]["delta"]["content"]
                    if number == stop:
                        break
            seen.tokens += number
            if not ended:
                seen.left += 1
                if not case.text.startswith(text):
                    seen.wrong.append(f"{about}: {text!r} does not begin {case.text!r}")
                return
        seen.whole += 1
        if text != case.text:
            seen.wrong.append(f"{about}: {text!r} for {case.text!r}")
    except httpx.HTTPError as error:
        seen.failed.append(repr(error))


async def crowd(url: str, pool: Sequence[Case], clients: int, seconds: float) -> Seen:
    """Clients that ask again as soon as they are answered."""
    seen, until = Seen(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients)

    async def one(number: int) -> None:
        rng = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
            while time.monotonic() < until:
                stream = rng.random() < 0.6
                await ask(client, rng.choice(pool), seen, stream=stream, leave=stream and rng.random() < _LEFT / 0.6)

    await asyncio.gather(*(one(number) for number in range(clients)))
    return seen


async def at_once(url: str, chosen: Sequence[Case]) -> Seen:
    """All of them at once."""
    seen = Seen()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await asyncio.gather(*(ask(client, case, seen, stream=False, leave=False) for case in chosen))
    return seen


async def in_turn(url: str, chosen: Sequence[Case]) -> Seen:
    """One after another."""
    seen = Seen()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for case in chosen:
            await ask(client, case, seen, stream=False, leave=False)
    return seen


def heads_of(model: dps.HookedModel, user: str) -> HeadSet:
    """Those of a user's profile."""
    rng, cfg = random.Random(user), model.cfg
    return HeadSet({(rng.randrange(cfg.n_layers), rng.randrange(cfg.n_heads)) for _ in range(6)})


def write_profiles(model: dps.HookedModel, folder: str) -> None:
    """Profiles of the users."""
    for user in _USERS:
        profile = SteeringProfile(user=user, model=model_of(model), heads=str(heads_of(model, user)))
        ProfileStore(folder).write(profile)


def quantiles(values: Sequence[float]) -> str:
    """Median and 95th percentile, in milliseconds."""
    cut = statistics.quantiles(values, n=20) if len(values) > 1 else [*values] * 19
    return f"p50 {1000 * statistics.median(values):.0f} ms, p95 {1000 * cut[-1]:.0f} ms"


def measure(app: Any, eight: Sequence[Case], pool: Sequence[Case], asked: argparse.Namespace) -> list[str]:
    """Print what is measured; what went wrong."""
    process, problems = psutil.Process(), []
    with Served(app) as server:
        asyncio.run(at_once(server.url, eight))
        ratios = []
        for repeat in range(asked.repeats):
            times = {}
            for way in (in_turn, at_once) if repeat % 2 else (at_once, in_turn):
                begin = time.perf_counter()
                seen = asyncio.run(way(server.url, eight))
                times[way] = time.perf_counter() - begin
                problems += [*seen.wrong, *seen.failed]
            ratios.append(times[at_once] / times[in_turn])
            print(
                f"8 users, one after another {times[in_turn]:.2f} s, at once {times[at_once]:.2f} s: {ratios[-1]:.2f}"
            )
        print(f"8 users at once take {statistics.median(ratios):.2f} of the time of one after another")
        asyncio.run(crowd(server.url, pool, asked.clients, asked.seconds / 4))
        before = process.memory_info().rss
        begin = time.perf_counter()
        seen = asyncio.run(crowd(server.url, pool, asked.clients, asked.seconds))
        took, after = time.perf_counter() - begin, process.memory_info().rss
    print(f"{asked.clients} clients, {took:.0f} s: {seen.whole} whole answers, {seen.left} left in the middle")
    print(f"  wrong {len(seen.wrong)}, failed {len(seen.failed)}")
    print(f"  first token {quantiles(seen.first)}; from token to token {quantiles(seen.each)}")
    print(
        f"  {seen.tokens / took:.0f} tokens a second; memory {before / 2**20:.0f} MiB before, {after / 2**20:.0f} after"
    )
    return [*problems, *seen.wrong, *seen.failed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as dps_lens.load_model takes it")
    parser.add_argument("--clients", type=int, default=64, help="that ask at once")
    parser.add_argument("--seconds", type=float, default=60.0, help="that they go on for")
    parser.add_argument("--repeats", type=int, default=3, help="of the requests of 8 users")
    parser.add_argument("--tokens", type=int, default=48, help="each of these users is answered with")
    parser.add_argument("--threads", type=int, help="of torch; its own choice by default")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    thread = ModelThread()
    model = thread.run(dps.load_model, asked.model)
    eight = thread.run(cases, model, 8, kinds=["dps"], tokens=(asked.tokens, asked.tokens), words=30, seed=1)
    pool = thread.run(cases, model, 45)
    with tempfile.TemporaryDirectory() as folder:
        thread.run(write_profiles, model, folder)
        limits = Limits(waiting=4 * asked.clients)
        app = thread.run(make_server, model, name=NAME, profiles=folder, thread=thread, limits=limits)
        problems = measure(app, eight, pool, asked)
    if problems:
        print(*problems[:10], sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
