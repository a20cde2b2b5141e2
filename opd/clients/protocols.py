"""What our servers and those who ask them must both know, in the one place from which
both take it.
"""

import ipaddress

# Names the token that our servers ask for where it is set, and that control routes always want.
TOKEN_VARIABLE = "OPD_SERVER_TOKEN"

# What a server says at /version.
SCORING = "opd-scoring-1"
ROLLOUT = "opd-rollout-1"
LOGPROB = "opd-logprob-1"


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches `host`, a name or an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
