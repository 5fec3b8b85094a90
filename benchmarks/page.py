"""How long a page lets wait: to open it, to measure heads, and to see the first word of a steered text.

    python benchmarks/page.py runs/demo

The live page of a run is served by `dps-lens explore` and opened in Chromium. Times are from a click to what the page
then shows. Questions that it was not asked before are told from other heads of the same question.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plotly.graph_objects  # noqa: F401  the first import of it takes seconds, of which no page is guilty
from playwright.sync_api import Page, expect, sync_playwright

_WAIT = 60_000
_HEADS = ("L14H3,L20H6", "L20H6,L24H0,L14H3,L26H3,L8H0", "L0H1,L20H6", "L21H8", "L17H5,L18H6")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of 'dps-lens demo' or 'score'")
    parser.add_argument("--pause", type=float, default=4, help="seconds to look at a question before it is asked")
    options = parser.parse_args()
    with served(options.run) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        report("page opened and drawn", [timed(lambda: opened(page, url))])
        report("size of the page, MiB", [len(page.request.get(url).body()) / 2**20])
        page.click("#tab-ask")
        examples = page.eval_on_selector_all("#ask-example option[value]", "all => all.map(one => one.value)")
        examples = [one for one in examples if one]
        for ablation in page.eval_on_selector_all("#ask-ablation option", "all => all.map(one => one.value)"):
            page.select_option("#ask-ablation", ablation)
            fresh, again = [], []
            for example in examples:
                page.select_option("#ask-example", example)
                page.fill("#ask-heads", _HEADS[0])
                time.sleep(options.pause)
                fresh.append(timed(lambda: asked(page, "measure", "table >> text=task_cost")))
                for heads in _HEADS[1:]:
                    page.fill("#ask-heads", heads)
                    again.append(timed(lambda: asked(page, "measure", "table >> text=task_cost")))
            report(f"{ablation}: measured, a new question", fresh)
            report(f"{ablation}: measured, other heads of it", again)
        page.select_option("#ask-ablation", "zero")
        first = []
        for example in examples:
            page.select_option("#ask-example", example)
            time.sleep(options.pause)
            first.append(timed(lambda: asked(page, "write", ".tokens")))
            expect(page.locator("#ask-spinner")).to_be_hidden(timeout=_WAIT)
        report("first word of a steered text", first)
        browser.close()


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of a live page, until it is left."""
    command = [sys.executable, "-m", "dps_lens", "explore", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[0]
        finally:
            process.terminate()


def opened(page: Page, url: str) -> None:
    page.goto(url)
    page.wait_for_selector(".heatmaplayer image", timeout=_WAIT)


def asked(page: Page, kind: str, shown: str) -> None:
    """Click, and wait until the newest answer shows it."""
    before = page.locator("#ask-answers article").count()
    page.click(f"#ask-{kind}")
    page.wait_for_selector(f"#ask-answers article:nth-of-type({1}) >> {shown}", timeout=_WAIT)
    assert page.locator("#ask-answers article").count() > before


def timed(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def report(name: str, times: list[float]) -> None:
    spread = f"{min(times):.2f} to {max(times):.2f}" if len(times) > 1 else ""
    print(f"{name:42} {statistics.median(times):6.2f}  {spread}", flush=True)


if __name__ == "__main__":
    main()
