"""Which tokens of a response the profile holds already."""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor


def copied_tokens(response: Sequence[int], profile: Sequence[int], n: int) -> Float64[Tensor, " pos"]:
    """1 where a response token ends an n-gram of the response that the profile holds, else 0.

    >>> copied_tokens([7, 1, 2, 3], [1, 2, 9], 2).tolist()
    [0.0, 0.0, 1.0, 0.0]
    """
    held = {tuple(profile[index : index + n]) for index in range(len(profile) - n + 1)}
    ends = [index >= n - 1 and tuple(response[index - n + 1 : index + 1]) in held for index in range(len(response))]
    return torch.tensor(ends, dtype=torch.float64)
