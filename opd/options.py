"""A flag: a field of a dataclass in `opd/config.py` that says of itself what it is for."""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import field, replace
from typing import Annotated, Any, get_type_hints

from annotated_types import Ge, Gt

from opd.hub_names import as_named

PositiveInt, NonNegativeInt = Annotated[int, Ge(1)], Annotated[int, Ge(0)]
PositiveFloat, NonNegativeFloat = Annotated[float, Gt(0)], Annotated[float, Ge(0)]


def option(default: Any, help: str, **metadata):
    """A field with its help text; a list default is copied. Its bounds are in its type.

    What else a field may say of itself: `fingerprinted`, whether another value makes it another run
    (False, True, or the part of the fingerprint that it stands in; `opd/inputs/identity.py`);
    `identifies`, whether a run directory with another value holds another run; `remedy`, what to do
    with a value out of bounds; `is_object`, whether its values are JSON objects.
    """
    metadata["help"] = help
    if isinstance(default, list):
        metadata.setdefault("action", "append")  # `--data a b` and `--data a --data b` are the same
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def groups_of(config_class) -> dict[str, type]:
    """The configuration groups of a script's Config: field name -> dataclass."""
    hints = get_type_hints(config_class)
    return {
        f.name: hints[f.name]
        for f in dataclasses.fields(config_class)
        if dataclasses.is_dataclass(hints[f.name])
    }


def options_of(config) -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(group, field, value) of every flag, in order."""
    for name in groups_of(type(config)):
        group = getattr(config, name)
        for flag in dataclasses.fields(group):
            yield name, flag, getattr(group, flag.name)


def to_dict(config) -> dict[str, Any]:
    """The flat mapping that `--config` reads back; hub models by commit, long form `teachers`."""
    flat = {flag.name: copy.copy(value) for _, flag, value in options_of(config)}
    flat.pop("teacher", None)
    flat["student_model"] = as_named(flat["student_model"])
    specs = (
        replace(spec, model=spec.named_model, adapter=as_named(spec.adapter))
        for spec in config.teachers
    )
    flat["teachers"] = [
        {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in dataclasses.asdict(spec).items()
            if k != "past"  # the model says it
        }
        for spec in specs
    ]
    return flat
