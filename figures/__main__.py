"""All figures of a run, and of experiments, as HTML, PDF and PNG, with their numbers (CSV) and a caption (txt).

python -m figures --run runs/demo --out figures/out
python -m figures --experiments runs
"""

import argparse
import sys
from html import unescape
from importlib import import_module
from pathlib import Path
from types import ModuleType

import plotly.graph_objects as go

from dps_lens import plots
from dps_lens.errors import DPSLensError, PlotError
from dps_lens.files import write_text
from figures.common import OUT, RUN

FILES = ("html", "csv", "pdf", "png")
NAMES = ("heads", "users", "overlap", "stability", "pareto", "k_sweep")
EXPERIMENTS = {
    "existence": "existence",
    "factors": "factors",
    "causality": "causality",
    "whose": "users",
    "samples": "samples",
    "positions": "positions",
    "artefact": "artefact",
    "transfer": "transfer",
    "safety": "safety",
    "steering": "steering_kl",
    "families": "families",
    "rules": "rules",
    "benchmark": "benchmark",
    "integration": "integration",
    "finders": "finders",
    "moonshot": "finders",
    "race": "race",
    "mechanism": "mechanism",
    "relatives": "mechanism",
}
"""Script → run folder of its experiment."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help=f"run folder of 'dps-lens demo' or 'score'; {RUN} by default")
    parser.add_argument("--experiments", type=Path, help="folder of the experiments' run folders")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    runs = dict.fromkeys(NAMES, arguments.run or RUN) if arguments.run or not arguments.experiments else {}
    if arguments.experiments:
        found = {name: arguments.experiments / folder for name, folder in EXPERIMENTS.items()}
        runs |= {name: folder for name, folder in found.items() if (folder / "results.md").is_file()}
    scripts = {name: import_module(f"figures.{name}") for name in runs}
    drawn = {}
    for name, script in scripts.items():
        try:
            drawn[name] = script.draw(runs[name])
        except (DPSLensError, FileNotFoundError) as error:
            print(f"{name} is not drawn: {error}", file=sys.stderr)
    for name, figure in drawn.items():
        write_text(arguments.out / f"{name}.txt", caption(scripts[name], figure))
    try:
        with plots.browser():
            for name, figure in drawn.items():
                plots.export(figure, arguments.out / name, formats=FILES, column=scripts[name].COLUMN)
    except PlotError as error:
        for name, figure in drawn.items():
            plots.export(figure, arguments.out / name, formats=("html", "csv"))
        sys.exit(f"only HTML and CSV were written: {error}")
    print(f"{len(drawn)} figures are in {arguments.out}")


def caption(script: ModuleType, figure: go.Figure) -> str:
    """What a figure shows, and its title, which print leaves out."""
    about = (script.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    title = (figure.layout.title.text or "").replace("<br>", " ")
    return f"{about} {unescape(title)}".strip() + "\n"


if __name__ == "__main__":
    main()
