"""A server's KV cache and the sequences that it takes, of published shapes."""

import argparse

import pytest

from opd.config import GIB
from opd.inputs.shapes import read_model, shape_of
from opd.servers import cache_size
from opd.servers.cache_size import cache_and_length, cache_gib
from tests.support.published import write_config


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")

    def read(name):
        path = write_config(name, root)
        return shape_of(read_model("--model", path), "--model", path)

    return {name: read(name) for name in ("Qwen3-0.6B", "Qwen3-32B", "Qwen3-Coder-30B-A3B")}


@pytest.fixture
def free(monkeypatch):
    def set_free(gib: float) -> None:
        monkeypatch.setattr(cache_size, "_free_bytes", lambda device: int(gib * GIB))

    return set_free


def beside(shape) -> float:
    """GiB of weights, and of what a CPU needs: the packed head, and the process."""
    values = shape.num_parameters + shape.vocab_size * shape.hidden_size
    return (2 * values + cache_size.BESIDE_CPU) / GIB


def asked(shape, length=None, gib="auto", tokens=8192):
    return cache_and_length(shape, length, gib, width=2, tokens=tokens)


def test_the_whole_context_where_there_is_room(shapes, free):
    free(72)
    gib, length = asked(shapes["Qwen3-0.6B"])
    assert length == 40960 and 4.375 < gib < 4.45, "one sequence of the model's whole context"
    gib, length = asked(shapes["Qwen3-0.6B"], 2048, tokens=100_000)
    assert length == 2048 and gib == pytest.approx(100_000 * 114_688 / GIB)


def test_a_context_for_which_there_is_no_memory_is_cut_and_said(shapes, free, capfd):
    free(72)
    gib, length = asked(shapes["Qwen3-Coder-30B-A3B"])
    room = 72 - beside(shapes["Qwen3-Coder-30B-A3B"])
    assert length < 262_144 and room - 0.1 < gib <= room
    assert f"takes {length} tokens of 262144: --kv_cache_gib auto: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("length", "gib", "line"),
    [
        (8192, 0.5, r"--kv_cache_gib 0.5: one sequence of 8192 tokens takes 2\.\d+ GiB; "
                    r"--max_model_len \d+ fits"),
        (40_960, "auto", r"--kv_cache_gib auto: 5\.\d+ GiB are free beside the weights: one "
                         r"sequence of 40960 tokens takes 10\.\d+ GiB; --max_model_len \d+ fits"),
        (None, 0.001, r"--kv_cache_gib 0.001: .*; give more, or auto"),
        (99_999, "auto", "--max_model_len 99999: over the 40960 tokens of"),
    ],
)  # fmt: skip
def test_what_vllm_would_refuse_is_a_line(shapes, free, length, gib, line):
    free(70)
    with pytest.raises(ValueError, match=line):
        asked(shapes["Qwen3-32B"], length, gib)


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf", ""])
def test_what_is_no_size_is_said(text):
    with pytest.raises(argparse.ArgumentTypeError, match="give GiB, above 0, or auto"):
        cache_gib(text)


def test_a_cpu_keeps_its_memory_for_others_too(shapes, free):
    """One sequence always, where it fits; of what is left beyond it, a quarter."""
    free(12)
    assert asked(shapes["Qwen3-0.6B"])[1] == 40960
    gib, _ = asked(shapes["Qwen3-0.6B"], 1024, tokens=1 << 20)
    assert gib == pytest.approx((12 - beside(shapes["Qwen3-0.6B"])) / 4, rel=0.01)


def test_a_model_larger_than_the_card(shapes, free):
    free(24)
    with pytest.raises(ValueError, match=r"auto: 0 GiB are free .*; take a smaller model"):
        asked(shapes["Qwen3-32B"])
