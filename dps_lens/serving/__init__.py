"""Steered models in others' hands: OpenAI's API, many users in one batch, and their profiles."""

from importlib.util import find_spec

if any(find_spec(one) is None for one in ("fastapi", "uvicorn", "prometheus_client")):
    raise ImportError("dps_lens.serving needs more packages; run: pip install fastapi uvicorn prometheus-client")

from dps_lens.model import ModelThread
from dps_lens.serving.api import make_server
from dps_lens.serving.keys import Keys, add_key
from dps_lens.serving.limits import Limits
from dps_lens.serving.profiles import ProfileStore, SteeringProfile, make_profiles, model_of
from dps_lens.serving.run import Served
from dps_lens.serving.steered import Steering

__all__ = [
    "Keys",
    "Limits",
    "ModelThread",
    "ProfileStore",
    "Served",
    "Steering",
    "SteeringProfile",
    "add_key",
    "make_profiles",
    "make_server",
    "model_of",
]
