"""The public names: what type checkers, editors and readers see of them."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dps_lens as dps

ROOT = Path(__file__).parents[1]
FUNCTIONS = [name for name in dps.__all__ if inspect.isfunction(getattr(dps, name))]
MOST = 14

MISTAKES = """
import dps_lens as dps

model = dps.load_model("smollm2-135m")
users = dps.load_users("probe")
scores = dps.score_heads(model, users, max_exmples=1)
scores = dps.score_heads(model, 3)
heads = dps.score_heads(model, users).topp(10)
curve = dps.ablation_curve(model, users)
"""


def checked(text, folder):
    """What mypy says of a user's script, line by line."""
    script = folder / "script.py"
    script.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--ignore-missing-imports"]
    command += ["--disable-error-code", "name-defined", str(script), "--cache-dir"]
    # With the cache of another state of the package, mypy has been seen to say nothing; then without.
    for cache in (ROOT / ".mypy_cache" / "scripts", folder / "cache"):
        done = subprocess.run([*command, str(cache)], capture_output=True, text=True, cwd=ROOT, check=False)
        assert "internal error" not in done.stderr.lower(), done.stderr
        said = [line.split(":", 1)[1] for line in done.stdout.splitlines() if line.startswith(str(script))]
        if said:
            return said
    raise AssertionError(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Of the mistakes, and of the type of every public function, in one run."""
    text = MISTAKES + "".join(f"reveal_type(dps.{name})\n" for name in FUNCTIONS)
    return checked(text, tmp_path_factory.mktemp("script"))


def test_mistakes_are_refused(said):
    errors = [line for line in said if " error: " in line]
    assert len(errors) == 4, errors
    expected = (
        (6, r'[Uu]nexpected keyword argument "max_exmples"'),
        (7, 'Argument 2 to "score_heads" has incompatible type "int"'),
        (8, '"HeadScores" has no attribute "topp"'),
        (9, 'Missing positional argument "families"'),
    )
    for line, (number, message) in zip(errors, expected, strict=True):
        assert line.startswith(f"{number}:"), line
        assert re.search(message, line), line


def test_public_functions_have_types(said):
    revealed = [line for line in said if "Revealed type" in line]
    assert len(revealed) == len(FUNCTIONS) > 30
    for name, line in zip(FUNCTIONS, revealed, strict=True):
        kind = line.split('"', 1)[1].rsplit('"', 1)[0]
        assert "def (" in kind, f"{name}: {kind}"
        # Without stubs of pandas, a table is Any to mypy.
        returned = inspect.signature(getattr(dps, name)).return_annotation
        assert not kind.endswith("-> Any") or "DataFrame" in str(returned), f"{name} returns Any"


def test_no_function_has_too_many_parameters():
    for name in FUNCTIONS:
        parameters = inspect.signature(getattr(dps, name)).parameters
        assert len(parameters) <= MOST, f"{name} has {len(parameters)}"


def test_every_name_is_there_for_people_and_type_checkers():
    tree = ast.parse((ROOT / "dps_lens" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {one.name: node.module for node in block.body for one in node.names}
    assert {*typed} == {*dps.__all__}
    assert sorted(dps.__all__, key=str) == sorted({*dps.__all__}, key=str), "a name stands twice"
    for name, module in typed.items():
        assert name in ("plots", "HookedModel") or getattr(dps, name).__module__.startswith(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = dps.nothing


@pytest.mark.parametrize("name", dps.__all__)
def test_every_public_name_is_documented(name):
    text = inspect.getdoc(getattr(dps, name))
    assert text, name
    assert text.splitlines()[0].rstrip().endswith((".", ":", "…")), f"{name}: {text.splitlines()[0]}"
