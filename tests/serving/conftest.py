"""A server of the small model, and its clients."""

from pathlib import Path

import httpx
import openai
import pytest
from served import profiles_of

from dps_lens.serving import Keys, Limits, ProfileStore, Served, add_key, make_server


@pytest.fixture(scope="module")
def model(tinies):
    return tinies("llama").hooked


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> ProfileStore:
    found = ProfileStore(tmp_path_factory.mktemp("profiles"))
    for one in profiles_of(model):
        found.write(one)
    return found


@pytest.fixture(scope="module")
def app(model, store):
    return make_server(model, name="tiny", profiles=store.folder, limits=Limits(tokens=64))


@pytest.fixture(scope="module")
def server(app):
    with Served(app) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def web(server):
    with httpx.Client(base_url=server.url, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(model, store, tmp_path_factory):
    """A server with keys: its client by the name of each."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    keys = {
        "root": add_key(path, "root", admin=True),
        "ann": add_key(path, "ann", users=["ann"]),
        "all": add_key(path, "all"),
    }
    folder = tmp_path_factory.mktemp("guarded")
    for one in profiles_of(model):
        ProfileStore(folder).write(one)
    with Served(
        make_server(model, name="tiny", profiles=folder, keys=Keys.read(path), limits=Limits(bytes=20_000, tokens=16))
    ) as found:

        def of(name: str | None) -> httpx.Client:
            headers = {"authorization": f"Bearer {keys[name]}"} if name else {}
            return httpx.Client(base_url=found.url, headers=headers, timeout=60)

        of.folder, of.path, of.keys = Path(folder), path, keys
        yield of
