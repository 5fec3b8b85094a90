"""All figures of a run, and of experiments, as HTML, PDF and PNG.

python -m figures --run runs/demo --out figures/out
python -m figures --experiments runs
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from dps_lens import plots
from dps_lens.errors import PlotError
from figures.common import OUT, RUN

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
    drawn = {name: script.draw(runs[name]) for name, script in scripts.items()}
    try:
        with plots.browser():
            for name, figure in drawn.items():
                plots.export(figure, arguments.out / name, column=scripts[name].COLUMN)
    except PlotError as error:
        for name, figure in drawn.items():
            plots.export(figure, arguments.out / name, formats=("html",))
        sys.exit(f"only HTML was written: {error}")
    print(f"{len(drawn)} figures are in {arguments.out}")


if __name__ == "__main__":
    main()
