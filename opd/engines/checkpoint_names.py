"""The parameters of a transformers model as its checkpoint holds them: other programs know no other
names.

transformers 5 keeps the experts of a layer in one tensor, and some families under other names than
their files. vLLM reads files. Here a running model's parameters get the names and shapes that
`save_pretrained` writes.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

_LAYER = re.compile(r"(.*?\.\d+)\.")  # as in model.layers.3.mlp.experts.down_proj
_ADAPTED = re.compile(r"(.*?)\.(base_layer|lora_[AB])\.")  # with an adapter, outside of layers


def persistent_tensors(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that a checkpoint holds, in the model's order: parameters, and buffers
    such as a router's bias.

    Tied ones come once, or with `remove_duplicate=False` under each of their names.
    """
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not (remove_duplicate and id(tensor) in seen):
            seen.add(id(tensor))
            yield name, tensor


def by_layer(named: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbours of one layer together, each parameter outside of layers alone (with its adapter,
    if it has one): no conversion reaches beyond a layer.
    """

    def layer_of(item: tuple[str, Tensor]) -> str:
        found = _LAYER.match(item[0]) or _ADAPTED.match(item[0])
        return found.group(1) if found else item[0]

    for _, layer in groupby(named, key=layer_of):
        yield list(layer)


def forget_prefixes(model: nn.Module) -> None:
    """To be called once on a model from files.

    Of the conversions that it has noted, it forgets changes of prefix.

    Under ZeRO-3 transformers 5.19 notes every conversion of a family, used or not, and one that was
    not used would put a prefix before each name that it writes.
    """
    noted = getattr(model, "_weight_conversions", None)
    if noted:
        model._weight_conversions = [
            change for change in noted if not isinstance(change, PrefixChange)
        ] or None


def checkpoint_tensors(
    model: nn.Module, layers: Iterable[list[tuple[str, Tensor]]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) as in a checkpoint, of the layers of `model` with its own names.

    Tied parameters come once.

    Most are views of what they come from, and valid until the next layer is asked for.
    """
    for layer in layers:
        yield from revert_weight_conversion(model, dict(layer)).items()


def checkpoint_views(model: nn.Module) -> dict[str, Tensor]:
    """Checkpoint name -> a view of the model's own values: who writes into it has changed the
    model. Tied ones share.

    On the meta device: shapes. ValueError if the family's conversion makes new values of what the
    model holds.
    """
    once: dict[int, Tensor] = {}  # tied ones are one object
    named = persistent_tensors(model, remove_duplicate=False)
    tensors = {name: once.setdefault(id(tensor), tensor.detach()) for name, tensor in named}
    with _KeepViews():
        views = dict(checkpoint_tensors(model, by_layer(tensors.items())))
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    for name, view in views.items():
        if view.untyped_storage().data_ptr() not in own:
            raise ValueError(
                f"{name}: {model.config.model_type} computes it from other parameters; it cannot "
                "be loaded alone"
            )
    return views


class _KeepViews(TorchFunctionMode):
    """Conversions copy slices to make them contiguous; a view need not be."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is Tensor.contiguous else func(*args, **(kwargs or {}))
