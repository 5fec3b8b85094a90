"""`dps-lens profile`, `key` and `serve`: what they write, and what they refuse before any work."""

import socket
import sys

import pytest
from typer.testing import CliRunner

import dps_lens as dps
from dps_lens.cli import app
from dps_lens.errors import DataError, DPSLensError
from dps_lens.serving import Keys, ProfileStore


def run(*arguments):
    """What a command prints."""
    done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def refused(*arguments):
    """Why a command does nothing."""
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert isinstance(done.exception, DPSLensError), done.output
    return str(done.exception)


@pytest.fixture(scope="module")
def made(tinies, probe, short, tmp_path_factory):
    """Run folders of scores and vectors."""
    folder, model = tmp_path_factory.mktemp("runs"), tinies("llama").hooked
    scores = dps.score_heads(model, probe, max_examples=1, prompt_config=short, out=folder / "scores")
    dps.head_vectors(
        model, probe, scores.top(2), prompt_config=short, max_examples=1, n_donors=1, out=folder / "vectors"
    )
    return folder, scores


def test_profiles_are_made_listed_and_deleted(made, tmp_path):
    folder, scores = made
    given = ("probe", "--run", folder / "scores", "--vectors", folder / "vectors", "--out", tmp_path, "--max-users", 3)
    assert "profiles of 3 users" in run("profile", "make", *given, "--k", 4, "--documents", "--max-kl", 0.5)
    shown = run("profile", "list", "--out", tmp_path).splitlines()
    assert len(shown) == 3
    assert shown[0].endswith("dps, gamma 1, 4 heads, a vector, 6 documents")
    first = ProfileStore(tmp_path).read("asker-bread")
    assert first.head_set().heads == scores.top(4).heads
    assert first.max_kl == 0.5
    ProfileStore(tmp_path).path("zoe").write_text("{")
    again = run("profile", "list", "--out", tmp_path)  # one that is damaged does not hide the others
    assert all(line in again for line in shown)
    assert "zoe.json is no profile" in again
    run("profile", "delete", "zoe", "--out", tmp_path)
    run("profile", "delete", "asker-bread", "--out", tmp_path)
    assert len(run("profile", "list", "--out", tmp_path).splitlines()) == 2
    assert "no profile of user" in refused("profile", "delete", "asker-bread", "--out", tmp_path)
    run("profile", "make", "probe", "--vectors", folder / "vectors", "--out", tmp_path, "--max-users", 1)
    assert ProfileStore(tmp_path).read("asker-bread").rule == "head_vector"


def test_profiles_that_no_server_would_take_are_not_made(made, tmp_path):
    folder, _ = made
    vectors = ("probe", "--vectors", folder / "vectors", "--out", tmp_path / "none", "--max-users", 1)
    assert "needs heads" in refused("profile", "make", "probe", "--out", tmp_path / "none", "--rule", "dps")
    assert "needs --vectors" in refused("profile", "make", "probe", "--out", tmp_path / "none")
    assert "max_kl" in refused("profile", "make", *vectors, "--max-kl", 0.5)
    assert "gamma" in refused("profile", "make", *vectors, "--gamma", -3)
    assert not (tmp_path / "none").exists()


def test_a_key_is_shown_once(tmp_path):
    path = tmp_path / "keys.json"
    key = run("key", "app", "--users", "ann,bob", "--keys", path).splitlines()[0]
    found = Keys.read(path).find(f"Bearer {key}")
    assert found.users == ("ann", "bob")
    assert not found.admin
    assert key not in path.read_text()
    assert "of the name 'app'" in refused("key", "app", "--keys", path)
    assert "of all users" in refused("key", "boss", "--admin", "--users", "ann", "--keys", path)


def test_serve_refuses_before_it_loads_anything(made, tmp_path, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(dps, "load_model", lambda *_, **__: pytest.fail("loaded"), raising=False)
    assert "can be reached from other machines" in refused("serve", "--host", "0.0.0.0")
    assert "not both" in refused("serve", "--run", folder / "scores", "--heads", "L0H1")
    assert "needs heads" in refused("serve", "--rule", "dps")
    assert "magic" in refused("serve", "--rule", "magic")
    (tmp_path / "keys.json").write_text("[]")
    assert "holds no keys" in refused("serve", "--keys", tmp_path / "keys.json")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be had" in refused("serve", "--port", taken.getsockname()[1])


def test_what_is_missing_is_named(monkeypatch):
    for name in [one for one in sys.modules if one.startswith("dps_lens.serving")]:
        monkeypatch.delitem(sys.modules, name)
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fastapi" else real(name, *rest)
    )
    assert "pip install fastapi" in refused("serve")


def test_a_key_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Keys.read(tmp_path / "keys.json")
