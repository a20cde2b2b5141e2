"""Whether a tensor holds numbers only, at the speed at which it is read."""

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """False for NaN and infinity, and for values so large that their sum in float32 is infinite.

    A sum carries both to its end, in one pass: a question for each value takes ten to thirty times
    as long on a CPU, where hidden states of gigabytes are checked by one thread.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    return bool(values.sum(dtype=wide).isfinite())
