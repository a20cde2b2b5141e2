"""What a user has to mend about the servers of an asynchronous run is one line, which names the
flag.
"""

import pytest

from opd.clients.protocols import ROLLOUT, TOKEN_VARIABLE
from opd.run import async_build
from opd.run.async_build import _check_server, _check_servers
from tests.support.pushed_server import TOKEN, Server
from tests.support.scripted_server import serving

FLAG = "--rollout_servers URL"


@pytest.fixture
def url(tmp_path):
    server = Server(tmp_path)
    server.control.protocol, server.control.max_model_len = ROLLOUT, 24
    with serving(server) as running:
        yield running.url


def test_a_server_of_the_right_kind_with_our_token(url, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    _check_server(FLAG, url, ROLLOUT, 24)


@pytest.mark.parametrize(
    ("token", "protocol", "message"),
    [
        (
            "another-token-of-16-characters",
            ROLLOUT,
            "OPD_SERVER_TOKEN is not the token that it was started with",
        ),
        ("", ROLLOUT, "OPD_SERVER_TOKEN is not the token that it was started with"),
        (
            TOKEN,
            ROLLOUT,
            "it takes 24 tokens, and .* are 25 together; start it with --max_model_len 25",
        ),
        (TOKEN, "opd-logprob-1", "no server of this kind .opd-rollout-1, not opd-logprob-1"),
    ],
)
def test_a_wrong_one(url, monkeypatch, token, protocol, message):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ValueError, match=f"^{FLAG}: .*{message}"):
        _check_server(FLAG, url, protocol, 25)


def test_none(monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    with pytest.raises(
        ValueError,
        match=r"^--rollout_servers http://127.0.0.1:9: cannot be reached: .*; start it first",
    ):
        _check_servers(
            "--rollout_servers", ["http://127.0.0.1:9", "http://127.0.0.1:10"], ROLLOUT, 24
        )


def test_one_of_two(url, monkeypatch):
    """It may be on its way back, as the trainer is."""
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    warnings = []
    monkeypatch.setattr(async_build, "warn", warnings.append)
    _check_servers("--rollout_servers", [url, "http://127.0.0.1:9"], ROLLOUT, 24)
    assert len(warnings) == 1 and "http://127.0.0.1:9: cannot be reached" in warnings[0]
