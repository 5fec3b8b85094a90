"""Execute the notebooks in place: figures are kept as pictures beside the interactive ones, progress is not kept.

python notebooks/execute.py [NOTEBOOK …]
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
_WIDGET = "application/vnd.jupyter.widget-view+json"


def executed(path: Path, folder: Path, environment: dict[str, str]) -> nbformat.NotebookNode:
    """A notebook with what its cells give, run in a folder."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(folder)}})
    environment = {name: value for name, value in os.environ.items() if name != "DPS_LENS_SMALL"} | environment
    done = client.execute(env=environment)
    for number, cell in enumerate(cell for cell in done.cells if cell.cell_type == "code"):
        cell.execution_count = number + 1
        cell.metadata.pop("execution", None)
        cell.outputs = [one for one in cell.outputs if not _is_progress(one)]
        for one in cell.outputs:
            if "execution_count" in one:
                one["execution_count"] = number + 1
    done.metadata.pop("widgets", None)
    return done


def _is_progress(output: nbformat.NotebookNode) -> bool:
    return (output.output_type == "stream" and output.name == "stderr") or _WIDGET in output.get("data", {})


def main() -> None:
    paths = [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb"))
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            done = executed(path, Path(folder), {"PLOTLY_RENDERER": "plotly_mimetype+png", "DPS_LENS_QUIET": "1"})
        nbformat.write(done, path)
        print(path)


if __name__ == "__main__":
    main()
