"""The documented command starts every kind of server on a published shape, Qwen3-0.6B, with all
flags at their defaults. Its weights are zeros in files of their full size.
"""

import json
import signal
import sys

import pytest
import yaml

from opd import processes
from scripts.measure.runs import byte_tokenizer
from tests.servers.test_launch import TOKEN, children_of, ended, launched, ready
from tests.support.published import PUBLISHED, write_hollow

NAME = "Qwen3-0.6B"
ROLES = {
    "binary": ["teacher"],
    "json": ["teacher", "--protocol", "json"],
    "rollout": ["rollout", "--weights_dir", "WEIGHTS"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("published")
    path = write_hollow(NAME, root)
    byte_tokenizer(PUBLISHED[NAME]["vocab_size"]).save_pretrained(path)
    return path


@pytest.mark.e2e
@pytest.mark.parametrize(
    "kind",
    ["binary", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("json", "rollout"))],
)
def test_it_starts_without_a_flag(model, tmp_path, kind):
    role, *flags = [str(tmp_path / "w") if word == "WEIGHTS" else word for word in ROLES[kind]]
    command = (sys.executable, "-m", "opd.servers.launch", role)
    token = {"OPD_SERVER_TOKEN": TOKEN} if role == "rollout" else {}
    with launched(tmp_path, model, *flags, command=command, **token) as (process, out, err):
        ready(process, out)
        entry = yaml.safe_load(out.read_text())
        urls = entry["teachers"][0]["urls"] if role == "teacher" else entry["rollout_servers"]
        assert len(urls) == 1 and json.dumps(entry)
        ended(process, signal.SIGTERM, children_of(process.pid))
    assert "Traceback" not in err.read_text()
    assert not any(processes.members(group) for group in [process.pid])
