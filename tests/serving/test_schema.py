"""Requests made up from the server's own description of itself: none is answered with a failure."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

OPERATIONS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/healthz"),
    ("GET", "/metrics"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/profiles"),
    ("GET", "/v1/profiles/{user}"),
    ("PUT", "/v1/profiles/{user}"),
    ("DELETE", "/v1/profiles/{user}"),
]


@pytest.fixture(scope="module")
def described(guarded):
    client = guarded("root")
    headers = {"authorization": client.headers["authorization"]}
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json", headers=headers), headers


def test_every_operation_is_tried(described):
    found = [one.ok() for one in described[0].get_all_operations()]
    assert {(one.method.upper(), one.path) for one in found} == {*OPERATIONS}


CASES = [(*one, GenerationMode.POSITIVE) for one in OPERATIONS] + [
    (method, path, GenerationMode.NEGATIVE) for method, path in OPERATIONS if method in ("POST", "PUT")
]


@pytest.mark.parametrize(("method", "path", "mode"), CASES, ids=lambda part: getattr(part, "value", part))
def test_made_up_requests_are_answered_as_described(described, method, path, mode):
    schema, headers = described

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=20,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def tried(case):
        if path.endswith("completions") and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            # Or none would get past the name, and those that do would write long texts.
            case.body |= {"model": "tiny", "max_tokens": case.body.get("max_tokens") or 2}
        # Whether made-up heads and names are those of this server is not in a description.
        unknown = [positive_data_acceptance, negative_data_rejection]
        case.call_and_validate(headers=headers, excluded_checks=unknown, timeout=60)

    tried()
