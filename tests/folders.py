"""What a run folder holds, for tests that compare two of them."""

import hashlib
import json


def digest(folder, without=("logs",)):
    """File → hash of what it holds; when and by which command it was made is left out."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not {*path.parts} & {*without}):
        if path.name == "made.json":
            continue
        content = path.read_bytes()
        if path.suffix == ".json":
            meta = json.loads(content)
            if isinstance(meta, dict) and isinstance(meta.get("manifest"), dict):
                meta["manifest"].pop("made", None)
                meta.pop("digest", None)
                content = json.dumps(meta, sort_keys=True).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found
