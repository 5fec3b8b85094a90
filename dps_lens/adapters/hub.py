"""DPS as a folder that `generate` of transformers runs, for those who have no dps_lens."""

import re
from importlib.resources import files
from pathlib import Path

from dps_lens.adapters.lora import check_exportable, projections_of
from dps_lens.errors import SteeringError
from dps_lens.files import write_text
from dps_lens.heads import HeadSet
from dps_lens.model import HookedModel
from dps_lens.steering.rules import check_strength

_MARK = "DPS inside `generate` of transformers"


def export_generate(model: HookedModel, heads: HeadSet, path: str | Path, *, gamma: float = 1.0) -> Path:
    """Write `custom_generate/generate.py` into a folder, which may be that of a model: one file, of transformers alone.

    `model.generate(**inputs, custom_generate=folder, trust_remote_code=True)` then writes what
    `dps.generate(…, heads=heads, gamma=gamma)` writes; in a repository of the Hub, `generate` of the model that is
    loaded from there does so by itself.

    Args:
        model: a `TransformerBridge` with the weights of its Hugging Face model.
        heads: of the rule `dps`, zeroed from the last prompt token on.
        path: the folder.
        gamma: strength where a call gives none, at least −1.

    Returns:
        the file.

    Raises:
        SteeringError: the model's heads are read by no module of Hugging Face's, or the folder holds a file of another
            origin.
        HeadError: a head is outside the model.
        FileError: the file cannot be written.
    """
    check_exportable("export_generate", model)
    check_strength("gamma", gamma)
    if not len(heads):
        raise SteeringError("export_generate: the head set is empty; give at least one head")
    mask = heads.mask(model.cfg)
    projections = projections_of("export_generate", model, mask.any(dim=1).nonzero().flatten().tolist())
    named = {one.name: mask[one.layer].nonzero().flatten().tolist() for one in projections}
    file = Path(path) / "custom_generate" / "generate.py"
    if file.exists() and _MARK not in file.read_text(encoding="utf-8", errors="replace"):
        raise SteeringError(f"export_generate: {file} is of another origin; use another folder")
    text = files("dps_lens.adapters").joinpath("custom_generate.py").read_text(encoding="utf-8")
    for name, value in (("WIDTH", int(model.cfg.d_head)), ("HEADS", named), ("GAMMA", float(gamma))):
        line = re.search(rf"^{name}(: [^=]*)? = .*$", text, flags=re.MULTILINE)
        assert line is not None, name
        text = text.replace(line[0], f"{name}{line[1] or ''} = {value!r}", 1)
    write_text(file, text)
    return file
