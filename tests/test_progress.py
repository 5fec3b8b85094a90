"""Progress is a bar where somebody looks, lines in a log file, and nothing where it was not asked for."""

import subprocess
import sys

import pytest

import dps_lens as dps
from dps_lens import progress

WORK = """
import time
from dps_lens import progress

progress._FIRST_LINE, progress._LINES_APART = {first}, {apart}
for _ in progress.progress_bar(range(6), desc="counting", unit="step"):
    time.sleep(0.05)
"""


def lines(first, apart, **env):
    """What is written to a pipe, which is no terminal."""
    done = subprocess.run(
        [sys.executable, "-c", WORK.format(first=first, apart=apart)],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    assert not done.stdout
    return done.stderr.splitlines()


def test_a_log_file_gets_a_line_now_and_then():
    written = lines(0.06, 0.06)
    assert 2 <= len(written) <= 6
    assert written[-1].startswith("counting: 6 of 6, 00:00 gone")
    assert len({*written}) == len(written)
    assert not any("\r" in line for line in written)


def test_the_first_line_does_not_wait_for_the_second():
    written = lines(0.1, 30)
    assert [line.split(",")[0] for line in written][-1] == "counting: 6 of 6"
    assert len(written) == 2
    assert len(lines(0.26, 30)) >= 1


def test_short_work_writes_nothing_and_quiet_work_never_does():
    assert lines(10, 30) == []
    assert lines(0.0, 0.0, DPS_LENS_QUIET="1") == []
    assert lines(0.1, 30, DPS_LENS_QUIET="0")


@pytest.mark.parametrize("shown", [True, False])
def test_a_long_unit_shows_its_steps(monkeypatch, llama, probe, shown):
    seen, real = [], progress.progress_bar

    def bar(items=None, *, desc, shown, **options):
        seen.append((desc, shown))
        return real(items, desc=desc, shown=False, **options)

    monkeypatch.setattr(progress, "progress_bar", bar)
    dps.find_heads(
        llama.hooked, probe[:2], 2, method=dps.Gates(role_steps=0), max_examples=1, max_neutral_cost=None,
        max_task_cost=None, find_config=dps.FindConfig(n_bootstraps=0, folds=False, neutral=()),
        run_config=dps.RunConfig(progress=shown),
    )  # fmt: skip
    assert ("fitting gates", shown) in seen
    assert ("fitting gates", not shown) not in seen
    assert list(progress.step_bar(iter("ab"), desc="alone", total=2)) == ["a", "b"]
    assert seen[-1] == ("alone", False)


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_gets_a_bar(monkeypatch, widgets):
    monkeypatch.setattr(progress, "_in_notebook", lambda: True)
    find = progress.importlib.util.find_spec
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: find(name) if widgets else None)
    bar = progress.progress_bar(range(3), desc="counting")
    assert type(bar).__module__ == ("tqdm.notebook" if widgets else "tqdm.std")
    assert not bar.disable
    assert list(bar) == [0, 1, 2]
    assert bar.n == 3


def test_a_kernel_is_told_from_a_script():
    assert not progress._in_notebook()
