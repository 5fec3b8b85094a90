"""A page as one file: one template, one script, and the data as JSON that nothing runs."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any


def rendered(said: Mapping[str, Any], *, live: Mapping[str, Any] | None = None) -> str:
    """The page of what `described` gives."""
    from jinja2 import Environment, PackageLoader, select_autoescape
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("dps_lens", "explorer"),
        autoescape=select_autoescape(default=True, default_for_string=True),
    )
    own = ("take.js", *(("ask.js",) if live else ()), "describe.js", "explorer.js")
    scripts = [_plotly(), *map(_read, own)]
    more = {
        "style": Markup(_read("explorer.css")),
        "scripts": [Markup(script) for script in scripts],
        "hashes": " ".join(_hash(script) for script in scripts),
        "connect": "'self'" if live else "'none'",
        "live": live is not None,
        "data": Markup(_json(said["data"] | {"live": live})),
    }
    return environment.get_template("explorer.html.jinja").render(**{**said, **more})


def showcase() -> str:
    """A finished page of the demo, which comes with the package."""
    packed = (files("dps_lens") / "explorer" / "showcase.json.gz").read_bytes()
    return rendered(json.loads(gzip.decompress(packed)))


def _json(value: object) -> str:
    """JSON that no text in it can end: a bare "<" is never needed."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


@cache
def _read(name: str) -> str:
    return (files("dps_lens") / "explorer" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return re.sub(r"</(?=script)", r"<\\/", get_plotlyjs(), flags=re.IGNORECASE).replace("\r\n", "\n")
