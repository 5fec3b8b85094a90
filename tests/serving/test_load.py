"""Many clients at once: every answer is its own, whoever comes and goes beside it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from benchmarks.serve import NAME, at_once, cases, crowd, write_profiles
from dps_lens.serving import Limits, Served, make_server


def go(way):
    """Run to its end what is asynchronous; in a thread of its own, as a browser in this one may have a loop there."""
    with ThreadPoolExecutor(1) as thread:
        return checked(thread.submit(asyncio.run, way).result())


def checked(seen):
    assert not seen.wrong, seen.wrong[:3]
    assert not seen.failed, seen.failed[:3]
    return seen


def test_no_answer_is_another_ones(model, tmp_path):
    write_profiles(model, tmp_path)
    pool = cases(model, 18, tokens=(2, 12), words=40)
    with Served(make_server(model, name=NAME, profiles=tmp_path, limits=Limits(chunk=64))) as server:
        go(at_once(server.url, pool))
        seen = go(crowd(server.url, pool, clients=8, seconds=6.0))
    assert seen.whole > 10
    assert seen.left > 1


@pytest.mark.full
@pytest.mark.real
def test_sixty_four_clients_for_a_minute(real, tmp_path):
    write_profiles(real, tmp_path)
    pool = cases(real, 27, tokens=(2, 16), words=40)
    process, sizes, whole = psutil.Process(), [], 0
    with Served(make_server(real, name=NAME, profiles=tmp_path)) as server:
        for _ in range(5):
            whole += go(crowd(server.url, pool, clients=64, seconds=15.0)).whole
            sizes.append(process.memory_info().rss)
    assert whole > 100
    # The first round fills the batch; what it holds then follows the lengths that are asked for, not the time.
    assert max(sizes[3:]) < 1.1 * max(sizes[1:3])
