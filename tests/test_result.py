"""Results load as they were written, or not at all."""

import json

import pytest
import torch
from fuzz import comparable, results
from safetensors.torch import load_file, save_file

import dps_lens as dps
from dps_lens.errors import DPSLensError, FileError, ScoreError

RESULTS = {name: one for one, name in results()}


@pytest.fixture(params=RESULTS)
def saved(request, tmp_path):
    result = RESULTS[request.param]
    result.save(tmp_path)
    return result, tmp_path / f"{request.param}.json"


def changed(file, change):
    """The JSON of a result, changed, and without a digest that would tell."""
    meta = json.loads(file.read_text())
    del meta["digest"]
    change(meta)
    file.write_text(json.dumps(meta))


def test_every_kind_comes_back(saved, tmp_path):
    result, file = saved
    again = type(result).load(file.parent)
    again.save(tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert comparable(path) == comparable(file.parent / path.name)


def test_a_number_that_was_changed_is_noticed(saved):
    result, file = saved
    meta = json.loads(file.read_text())
    meta["manifest"]["seed"] = 12345
    file.write_text(json.dumps(meta))
    with pytest.raises(result.error, match=f"{file.name} is not a whole {type(result).__name__} .its content is not"):
        type(result).load(file.parent)


def test_tensors_of_another_run_are_noticed(saved):
    result, file = saved
    beside = file.with_suffix(".safetensors")
    if not beside.exists():
        pytest.skip("no tensors")
    tensors = load_file(beside)
    first = sorted(tensors)[0]
    tensors[first] = tensors[first] + 1
    save_file(tensors, beside)
    with pytest.raises(DPSLensError, match="is not a whole"):
        type(result).load(file.parent)


def test_another_kind_or_format_is_noticed(saved):
    result, file = saved
    for change in (
        lambda meta: meta.update(kind="HeadScore"),
        lambda meta: meta.update(format=1),
        lambda meta: meta.update(format=True and "2"),
        lambda meta: meta.update(more=1),
        lambda meta: meta.pop("fields"),
        lambda meta: meta.update(fields=[]),
        lambda meta: meta.update(manifest=None),
    ):
        result.save(file.parent)
        changed(file, change)
        with pytest.raises(result.error, match="is not a whole"):
            type(result).load(file.parent)


def test_a_field_of_another_type_is_named(saved):
    result, file = saved
    fields = json.loads(file.read_text())["fields"]
    for name in fields:
        for value in (3.5, "text", {"a": 1}, [[1]], {"$": "tuple", "items": [{}]}):
            if fields[name] is None:
                continue  # of any type
            result.save(file.parent)
            changed(file, lambda meta, name=name, value=value: meta["fields"].update({name: value}))
            if name in ("label", "alpha", "correction"):
                continue
            with pytest.raises(result.error, match="is not a whole"):
                type(result).load(file.parent)


def test_axes_that_do_not_agree_are_noticed(tmp_path, unchecked):
    scores = RESULTS["scores"]
    with pytest.raises(ScoreError, match=r"component own is \(2, 2, 3\), the values are \(6, 2, 3\)"):
        dps.HeadScores(
            scores.values,
            example_ids=scores.example_ids,
            user_ids=scores.user_ids,
            components={"own": torch.ones(2, 2, 3)},
        )
    with pytest.raises(ScoreError, match="nll 'own' has not one value for each of 6 examples"):
        dps.HeadScores(
            scores.values, example_ids=scores.example_ids, user_ids=scores.user_ids, nll={"own": torch.ones(2)}
        )
    sweep = RESULTS["steering"]
    sweep.save(tmp_path)
    tensors = load_file(tmp_path / "steering.safetensors")
    tensors["nll"] = tensors["nll"][:2]
    save_file(tensors, tmp_path / "steering.safetensors")
    changed(tmp_path / "steering.json", lambda meta: None)
    with pytest.raises(ScoreError, match="field 'change' holds a dict that does not fit"):
        type(sweep).load(tmp_path)


def test_files_without_a_digest_load(saved):
    result, file = saved
    changed(file, lambda meta: None)
    assert repr(type(result).load(file.parent)) == repr(result)


def test_a_save_that_fails_leaves_the_former_result(saved, monkeypatch):
    result, file = saved
    before = {path: path.read_bytes() for path in file.parent.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(
        FileError, match="could not be written .No space left on device.; what was there before is kept"
    ):
        result.save(file.parent)
    assert {path: path.read_bytes() for path in file.parent.iterdir()} == before
