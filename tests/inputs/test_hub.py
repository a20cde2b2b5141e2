"""Models of the hub: what is asked of it, and when. The hub is one of this machine."""

import re
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from opd.hub_names import as_named
from opd.inputs import hub
from opd.inputs.arguments import parse
from opd.inputs.models import check_models, fetch_models, load_tokenizer
from opd.options import to_dict
from tests.support.hub import BRANCHES, COMMIT, a_hub
from tests.support.processes import ROOT
from train_mopd import Config


@pytest.fixture
def big(tiny, tmp_path) -> Path:
    """A student whose weights are larger than what is asked for its header."""
    path = tmp_path / "big"
    shutil.copytree(tiny.student, path)
    assert (path / "model.safetensors").stat().st_size > 200_000
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_headers", {})
    monkeypatch.setattr(hub, "_notes", {})
    return tmp_path / "cache"


def use(monkeypatch, server) -> None:
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def org(big, tiny, cache, monkeypatch):
    models = {"org/student": big, "org/teacher": tiny.reversal}
    with a_hub(models, gated=()) as server:
        use(monkeypatch, server)
        yield server


def config_of(student="org/student", teacher="org/teacher"):
    flags = f"--data d --output_dir o --ds_config {ROOT}/ds_configs/zero3.json"
    sizes = "--max_prompt_tokens 16 --max_response_tokens 8"
    argv = ["--student_model", student, "--teacher", f"math={teacher}", *flags.split()]
    return parse(Config, [*argv, *sizes.split()])


def checked(cfg):
    """As `prepare` does it."""
    cfg = hub.with_models(cfg, hub.find_models(cfg))
    check_models(cfg, load_tokenizer(cfg.model.student_model))
    return cfg


def refusal(cfg) -> str:
    with pytest.raises(ValueError) as caught:
        checked(cfg)
    assert "\n" not in str(caught.value)
    return as_named(str(caught.value))


def test_checks_read_headers_and_no_weights(org):
    checked(config_of())
    assert org.fetched("config.json") == {
        f"org/{name}:{kind}config.json"
        for name in ("student", "teacher")
        for kind in ("", "generation_", "tokenizer_")
    }
    assert not org.fetched(".safetensors"), org.sent
    assert org.asked["GET", "org/student:model.safetensors"] == 1
    notes = hub.not_checked()
    assert len(notes) == 2 and all("GiB to download" in note for note in notes), notes


def test_a_fault_of_the_weights_is_found_in_the_headers(org, big):
    tensors = load_file(big / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, big / "model.safetensors")
    line = refusal(config_of())
    assert f"--student_model org/student@{COMMIT}: 1 of" in line and "model.norm.weight" in line
    assert not org.fetched(".safetensors"), org.sent


def test_headers_that_cannot_be_had_are_said(org, monkeypatch):
    def no_answer(*args, **options):
        raise OSError("no ranges here")

    monkeypatch.setattr("opd.inputs.hub.HfApi.parse_safetensors_file_metadata", no_answer)
    checked(config_of())
    notes = hub.not_checked()
    assert len(notes) == 2 and all("not checked" in note for note in notes), notes


def test_weights_come_once_for_all_who_want_them(org, big):
    """Eight at once, as the ranks of a machine; what came is the file itself."""
    cfg = checked(config_of())
    flags = hub.models_here(cfg)
    org.asked.clear()
    org.sent.clear()
    threads = [threading.Thread(target=hub.fetch_weights, args=(flags,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {"org/student:model.safetensors", "org/teacher:model.safetensors"}
    assert org.fetched(".safetensors") == names
    assert all(org.asked["GET", name] == 1 for name in names), org.asked
    here = load_file(Path(cfg.model.student_model) / "model.safetensors")
    there = load_file(big / "model.safetensors")
    assert all(torch.equal(here[name], there[name]) for name in there)
    org.sent.clear()
    fetch_models(cfg)  # the files are checked, and nothing comes twice
    assert not org.fetched(".safetensors")


def test_files_that_came_are_checked(org, big):
    cfg = checked(config_of())
    tensors = load_file(big / "model.safetensors")
    del tensors["model.norm.weight"]  # between the look at the header and the download
    save_file(tensors, big / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of .* weights are not in its files"):
        fetch_models(cfg)


def test_what_is_in_the_cache_needs_no_hub(org, monkeypatch):
    fetch_models(checked(config_of()))
    org.asked.clear()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    fetch_models(checked(config_of()))
    assert not org.asked and hub._headers.keys() <= set(hub._notes)


def test_a_revision_is_recorded_as_its_commit(org):
    cfg = checked(config_of(student="org/student@v2"))
    found = to_dict(cfg)
    assert found["student_model"] == f"org/student@{BRANCHES['v2']}"
    assert found["teachers"][0]["model"] == f"org/teacher@{COMMIT}"
    again = checked(config_of(student=found["student_model"]))
    assert again.model == cfg.model


def test_a_second_form_of_the_weights_stays_at_the_hub(org, big):
    """An index names the files; Mistral's consolidated.safetensors lie beside them."""
    (big / "model.safetensors").rename(big / "model-00001-of-00001.safetensors")
    shutil.copy(big / "model-00001-of-00001.safetensors", big / "consolidated.safetensors")
    names = load_file(big / "consolidated.safetensors")
    index = {name: "model-00001-of-00001.safetensors" for name in names}
    text = str({"metadata": {}, "weight_map": index}).replace("'", '"')
    (big / "model.safetensors.index.json").write_text(text)
    fetch_models(checked(config_of()))
    assert "org/student:model-00001-of-00001.safetensors" in org.fetched(".safetensors")
    assert "org/student:consolidated.safetensors" not in org.sent


def test_a_disk_that_is_too_small_is_found_out_before(org, cache, monkeypatch):
    cfg = checked(config_of())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(ValueError) as caught:
        fetch_models(cfg)
    line = as_named(str(caught.value))
    assert re.match(
        r"--\w+( math)? org/\w+@\w{40}: the download needs \d+\.\d GiB, and 0\.0 GiB are "
        r"free in .*cache; set HF_HOME",
        line,
    )
    assert not org.fetched(".safetensors")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("org/nobody", "no such model on the hub"),
        ("org/student@v9", "the hub has no such revision"),
        ("org/gated", "ask on its page, and set HF_TOKEN"),
        ("what is this", "not a hub id"),
        ("org/student@", "write ORG/NAME@REVISION"),
        ("org/student@main@v1", "write ORG/NAME@REVISION"),
        ("/no/such/place", "no such model directory"),
    ],
)
def test_what_the_hub_refuses_is_one_line(org, big, model, reason):
    org.models["org/gated"] = big
    org.gated.add("org/gated")
    assert refusal(config_of(teacher=model)).startswith(f"--teacher math {model}: ")
    assert reason in refusal(config_of(teacher=model))


def test_without_a_network_and_without_a_copy(org, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    line = refusal(config_of())
    assert "the hub cannot be asked" in line and line.endswith("hf download org/student")
    line = refusal(config_of(student="org/student@v1"))
    assert line.endswith("hf download org/student --revision v1")
