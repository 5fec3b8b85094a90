"""All figures of a run, as HTML, PDF and PNG.

python -m figures --run runs/demo --out figures/out
"""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from dps_lens import plots
from dps_lens.errors import PlotError
from figures.common import OUT, RUN

NAMES = ("heads", "users", "overlap", "stability", "pareto", "k_sweep")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=RUN)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    scripts = {name: import_module(f"figures.{name}") for name in NAMES}
    drawn = {name: script.draw(arguments.run) for name, script in scripts.items()}
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
