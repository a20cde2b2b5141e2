"""A running model's tensors under the names of its checkpoint: what `save_pretrained` writes, and
views to load into.
"""

import pytest
import torch
from safetensors.torch import load_file

from opd.engines.checkpoint_names import (
    by_layer,
    checkpoint_tensors,
    checkpoint_views,
    persistent_tensors,
)
from opd.weights.store import check_names
from scripts.measure.families import BY_NAME, make_config, make_model

FAMILIES = (
    "llama",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "granitemoe",
    "olmoe",
    "glm4_moe",
    "gpt2",
    "gemma4",
)


def build(name: str, seed: int):
    family = BY_NAME[name]
    return make_model(family, make_config(family, 0, 1), seed)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_values_are_those_of_the_file(tmp_path, name):
    model = build(name, 0)
    model.save_pretrained(tmp_path)
    found = dict(checkpoint_tensors(model, by_layer(persistent_tensors(model))))
    written = load_file(tmp_path / "model.safetensors")
    assert found.keys() == written.keys()
    assert all(torch.equal(found[key], written[key]) for key in written)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_who_writes_into_a_view_has_changed_the_model(name):
    """Tied tensors are one object, by either name, as those who check a push ask."""
    model, other = build(name, 0), build(name, 1)
    views = checkpoint_views(model)
    pushed = dict(checkpoint_tensors(other, by_layer(persistent_tensors(other))))
    check_names(pushed, views)
    for key, value in pushed.items():
        views[key].copy_(value)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_on_the_meta_device_there_are_shapes():
    family = BY_NAME["qwen3_moe"]
    with torch.device("meta"):
        meta = make_model(family, make_config(family, 0, 1), 0)
    shapes = {name: view.shape for name, view in checkpoint_views(meta).items()}
    assert shapes == {
        name: view.shape for name, view in checkpoint_views(build("qwen3_moe", 0)).items()
    }
