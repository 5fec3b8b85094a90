"""Which module may know which."""

import ast
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "dps_lens").rglob("*.py")
}


def imported(path):
    """Modules of the package that a file names anywhere: at its top, in a function, for type checkers only."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for one in node.names:
                longer = f"{node.module}.{one.name}"
                yield longer if longer in MODULES else node.module


def test_no_module_imports_another_in_a_circle():
    edges = {name: {one for one in imported(path) if one in MODULES} - {name} for name, path in MODULES.items()}
    assert sum(map(len, edges.values())) > 500
    TopologicalSorter(edges).prepare()  # raises for a circle, and names it


def test_imports_run_downwards():
    program = Path(sys.executable).with_name("lint-imports")
    assert program.is_file() or shutil.which("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
