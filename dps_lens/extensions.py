"""Objects of somebody's own: by import path, for the command line, and what fingerprints hold of them."""

import ast
import hashlib
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dps_lens.errors import ExtensionError

T = TypeVar("T")
_PATH = re.compile(r"(?P<module>[\w ~./\\-]+(?:\.py)?):(?P<name>[A-Za-z_]\w*)(?P<call>\(.*\))?")
_LOADED: list[ModuleType] = []


def settings_of(name: str, one: object) -> Any:
    """The name of an object, with its fields where there are any, as JSON knows them; tensors by digest."""
    shown = {key: _plain(value) for key, value in vars(one).items() if value is not None and not key.startswith("_")}
    return {"name": name, **shown} if shown else name


def _plain(value: object) -> Any:
    # The command line reads this module before it knows that it needs torch.
    import numpy as np
    import torch

    from dps_lens.digests import tensor_digest

    if isinstance(value, torch.Tensor):
        return tensor_digest(value)
    if isinstance(value, np.ndarray):
        return _plain(torch.from_numpy(np.ascontiguousarray(value))) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def is_path(text: str) -> bool:
    """Whether a text names an object: `file.py:Name`, `package.module:Name`, `file.py:Name(seed=1)`."""
    match = _PATH.fullmatch(text.strip())
    return match is not None and ("." in match["module"] or match["call"] is not None)


def load_object(text: str, kind: type[T] | None = None) -> T:
    """The object behind an import path; a class is called, with the literal arguments that stand behind it, if any.

    Args:
        text: `file.py:Name` or `package.module:Name`, or either with arguments, `file.py:Name(seed=1)`.
        kind: what it must be.

    Raises:
        ExtensionError: there is no such module or name, it does not load, or it is something else.
    """
    match = _PATH.fullmatch(text.strip())
    if match is None:
        raise ExtensionError(f"{text!r} is no import path; write file.py:Name or package.module:Name")
    try:
        found = getattr(_module(match["module"]), match["name"])
        value: Any = found(**_arguments(match["call"] or "()")) if isinstance(found, type) else found
    except ExtensionError:
        raise
    except Exception as error:  # somebody else's code may raise anything
        raise ExtensionError(f"{text!r} cannot be loaded ({type(error).__name__}: {error})") from error
    if kind is not None and not isinstance(value, kind):
        raise ExtensionError(f"{text!r} is a {type(value).__name__}, asked for is a {kind.__name__}")
    return value


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        return import_module(name)
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise ExtensionError(f"there is no file {name}")
    # Two files may have one name, or that of a library.
    called = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if called in sys.modules:
        return sys.modules[called]
    spec = spec_from_file_location(called, path)
    if spec is None or spec.loader is None:
        raise ExtensionError(f"{name} is no Python file")
    module = sys.modules[called] = module_from_spec(spec)
    sys.path.append(str(path.parent))  # for what the file imports from beside it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[called]
        raise
    _LOADED.append(module)
    return module


def loaded_files() -> tuple[ModuleType, ...]:
    """Modules of the files that objects came from; other machines cannot import them by name."""
    return tuple(_LOADED)


def _arguments(call: str) -> dict[str, Any]:
    tree = ast.parse(f"f{call}", mode="eval").body
    if not isinstance(tree, ast.Call) or tree.args:
        raise ExtensionError(f"{call} are no keyword arguments; write Name(seed=1)")
    return {str(one.arg): ast.literal_eval(one.value) for one in tree.keywords}
