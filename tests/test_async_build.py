"""What a user has to mend about the servers of an asynchronous run is one line, which names the flag."""

import pytest

from opd.async_build import _check_server
from opd.protocols import ROLLOUT, TOKEN_VARIABLE
from tests.test_async_rollout import serving
from tests.test_weight_keeper import TOKEN, Server

FLAG = "--rollout_servers URL"


@pytest.fixture
def url(tmp_path):
    server = Server(tmp_path)
    server.control.protocol = ROLLOUT
    with serving(server) as running:
        yield running.url


def test_a_server_of_the_right_kind_with_our_token(url, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    _check_server(FLAG, url, ROLLOUT)


@pytest.mark.parametrize(
    ("token", "protocol", "message"),
    [
        ("another-token-of-16-characters", ROLLOUT, "OPD_SERVER_TOKEN is not the token that it was started with"),
        ("", ROLLOUT, "OPD_SERVER_TOKEN is not the token that it was started with"),
        (TOKEN, "opd-logprob-1", "no server of this kind .opd-rollout-1, not opd-logprob-1"),
    ],
)
def test_a_wrong_one(url, monkeypatch, token, protocol, message):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ValueError, match=f"^{FLAG}: .*{message}"):
        _check_server(FLAG, url, protocol)


def test_none(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with pytest.raises(ValueError, match=f"^{FLAG}: cannot be reached: .*; start it first"):
        _check_server(FLAG, "http://127.0.0.1:9", ROLLOUT)
