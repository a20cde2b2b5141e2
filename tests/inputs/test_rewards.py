"""Task rewards and group-relative advantages."""

import math

import pytest

from opd.inputs.rewards import exact_match, group_relative_advantages, last_number, load_reward
from opd.types import Prompt


def prompt(answer: str | None) -> Prompt:
    return Prompt(prompt_id=7, domain="math", token_ids=[1], answer=answer)


@pytest.mark.parametrize(
    ("text", "reward"), [("231", 1), (" 231\n", 1), ("2310", 0), ("", 0), ("2 31", 0)]
)
def test_exact_match(text, reward):
    assert exact_match(prompt("231 "), text) == reward


@pytest.mark.parametrize(
    ("answer", "text", "reward"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "so 48 + 24 = 72.", 1),
        ("48/2 = 24\n#### 72", "the answer is 24", 0),
        ("#### 1,234", "$1234.00 in total", 1),
        ("1234", "it costs 1,234", 1),
        ("#### 5", "#### 5\n", 1),
        ("#### -3", "it fell to -3.", 1),
        ("#### 3", "it fell to -3", 0),
        ("#### 3", "10-7=3, that is 3", 1),
        ("#### 7", "count 10-7", 1),  # a minus after a number subtracts
        ("#### 0.5", "one half, .5", 1),
        ("#### 0.5", "one half", 0),
        ("#### 12", "1,2,12", 1),
        ("#### -5", "-$5", 1),
        ("#### 72", "", 0),
        (
            "#### 10000000000000000001",
            "10000000000000000000",
            0,
        ),  # not equal, though it is as floats
    ],
)
def test_last_number(answer, text, reward):
    assert last_number(prompt(answer), text) == reward


def test_a_reference_that_cannot_be_used_is_an_error():
    with pytest.raises(ValueError, match=r"prompt 7 .*reference"):
        exact_match(prompt(None), "x")
    with pytest.raises(ValueError, match="no number in the answer of prompt 7"):
        last_number(prompt("none at all"), "72")


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompt, text):\n    return len(text)\n"
        "def broken(prompt, text):\n    return float('nan')\n"
        "def wordy(prompt, text):\n    return 'good'\n"
    )
    (tmp_path / "bad_syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    assert load_reward("my_rewards:length")(prompt(None), "abc") == 3.0
    for name in ("broken", "wordy"):
        with pytest.raises(ValueError, match=f"my_rewards:{name}.*prompt 7"):
            load_reward(f"my_rewards:{name}")(prompt(None), "abc")
    for name, message in {
        "exact_mach": "exact_match, last_number",
        "my_rewards:": "module:function",
        "no_such_module:f": "cannot import no_such_module",
        "bad_syntax:f": "cannot import bad_syntax",
        "my_rewards:no": "no function no",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_reward(name)
        assert "--reward_fn" in str(caught.value) and "\n" not in str(caught.value)


def test_built_in_rewards_by_name():
    assert load_reward("exact_match")(prompt("a"), "a") == 1.0
    assert load_reward("last_number")(prompt("#### 2"), "2") == 1.0


def test_group_relative_advantages():
    advantages = group_relative_advantages([1.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0], 4)
    assert advantages[:4] == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3], abs=1e-4)
    assert advantages[4:] == [0.0] * 4


def test_equal_rewards_that_do_not_add_up_exactly_teach_nothing():
    assert group_relative_advantages([0.1] * 3, 3) == [0.0] * 3


def test_advantages_do_not_change_with_the_scale_of_the_reward():
    rewards = [0.0, 1.0, 3.0, 0.5]
    scaled = group_relative_advantages([100 * r - 7 for r in rewards], 4)
    assert group_relative_advantages(rewards, 4) == pytest.approx(scaled, abs=1e-4)
