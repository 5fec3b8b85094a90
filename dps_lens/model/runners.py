"""Which runner a model has."""

from dps_lens.model.describe import check_weights
from dps_lens.model.protocol import HookedModel, is_bridge
from dps_lens.model.runner import Runner


def runner_of(model: HookedModel) -> Runner:
    """The runner of a `TransformerBridge` or a `HookedTransformer`.

    Raises:
        ModelCheckError: the model was loaded without weights.
    """
    check_weights(model)
    if is_bridge(model):
        from dps_lens.model.bridge import BridgeRunner

        return BridgeRunner(model)
    from dps_lens.model.hooked import HookedRunner

    return HookedRunner(model)
