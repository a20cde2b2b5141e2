"""The upload at the end of a run, with a hub that is made up."""

import shlex

import httpx2
import pytest
from huggingface_hub import constants, errors

from opd.records import hub_upload
from opd.records.hub_upload import check_push, push_model

WRITER = {
    "name": "ann",
    "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}],
    "auth": {"accessToken": {"role": "write"}},
}
READER = {**WRITER, "auth": {"accessToken": {"role": "read"}}}


class Hub:
    """What HfApi is asked for here, and what it answers."""

    def __init__(self, user=WRITER, failure=None):
        self.user, self.failure, self.calls = user, failure, []

    def whoami(self):
        if isinstance(self.user, Exception):
            raise self.user
        return self.user

    def create_repo(self, name, *, private, exist_ok):
        self.calls.append(("create_repo", name, private, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        assert commit_message
        self.calls.append(("upload_folder", repo_id, sorted(p.name for p in folder_path.iterdir())))
        if self.failure:
            raise self.failure


@pytest.fixture
def use(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def use(hub: Hub) -> Hub:
        monkeypatch.setattr(hub_upload, "HfApi", lambda: hub)
        return hub

    return use


def refused(status: int) -> errors.HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub/api/whoami-v2")
    return errors.HfHubHTTPError("no", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize("name", ["", "lab/model", "ann/model-1.0"])
def test_a_name_that_the_token_may_write_to_is_accepted(use, name):
    hub = use(Hub())
    check_push(name)
    assert hub.calls == []  # nothing is made before there is a model


@pytest.mark.parametrize(
    ("name", "user", "reason"),
    [
        ("model", WRITER, "expected ORG/NAME"),
        ("lab/", WRITER, "expected ORG/NAME"),
        ("lab/a/b", WRITER, "expected ORG/NAME"),
        ("lab/model", errors.LocalTokenNotFoundError("none"), "no token; set HF_TOKEN"),
        ("lab/model", refused(401), "the hub does not know the token"),
        ("lab/model", refused(503), "the hub cannot be asked"),
        ("lab/model", httpx2.ConnectError("no route"), "the hub cannot be asked: no route"),
        ("lab/model", READER, "the token may read only"),
        ("other/model", WRITER, "belongs to lab, club, ann; choose one of them"),
        ("club/model", WRITER, "ann may only read in club"),
    ],
)
def test_what_would_fail_at_the_end_is_one_line_at_the_start(use, name, user, reason):
    use(Hub(user))
    with pytest.raises(ValueError) as caught:
        check_push(name)
    line = str(caught.value)
    assert line.startswith(f"--push_to_hub {name}: ") and reason in line and "\n" not in line


def test_without_a_network_nobody_is_asked(use, monkeypatch):
    use(Hub(AssertionError("asked")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        check_push("lab/model")


@pytest.fixture
def model_dir(tmp_path):
    path = tmp_path / "my model"
    path.mkdir()
    for name in ("README.md", "model.safetensors"):
        (path / name).touch()
    return path


def test_the_model_goes_to_a_private_repository(use, model_dir, capsys):
    hub = use(Hub())
    push_model(model_dir, "lab/model")
    assert hub.calls == [
        ("create_repo", "lab/model", True, True),
        ("upload_folder", "lab/model", ["README.md", "model.safetensors"]),
    ]
    assert f"uploaded: {constants.ENDPOINT}/lab/model\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "failure", [refused(500), OSError("disk"), RuntimeError("xet: secret-of-the-token\nmore")]
)
def test_a_failed_upload_is_a_warning_with_the_command(
    use, model_dir, failure, capsys, monkeypatch
):
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-token")
    use(Hub(failure=failure))
    push_model(model_dir, "lab/model")
    shown = capsys.readouterr()
    assert "uploaded" not in shown.out and "secret-of-the-token" not in shown.err
    (line,) = shown.err.splitlines()
    command = line.partition("upload it with: ")[2]
    assert shlex.split(command) == ["hf", "upload", "lab/model", str(model_dir), "--private"]
    assert len(list(model_dir.iterdir())) == 2


def test_only_rank_0_uploads(use, model_dir, monkeypatch):
    """And the others wait for it, however long it takes."""
    hub, rank = use(Hub()), 1
    store, waits = {}, []

    class Store:
        def set(self, key, value):
            store[key] = value

        def wait(self, keys, timeout):
            waits.append((keys, timeout))

    monkeypatch.setattr("opd.distributed._store", Store())
    monkeypatch.setattr("opd.distributed.world_size", lambda: 2)
    for module in ("opd.distributed", "opd.records.hub_upload", "opd.log"):
        monkeypatch.setattr(f"{module}.rank", lambda: rank)
    push_model(model_dir, "lab/model")
    assert not hub.calls and waits == [(["opd/waited/upload"], hub_upload.UPLOAD_TIMEOUT)]
    rank = 0
    push_model(model_dir, "lab/model")
    assert len(hub.calls) == 2 and store == {"opd/waited/upload": ""} and len(waits) == 1
