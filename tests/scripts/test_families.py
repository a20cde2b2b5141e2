"""Model families: their tiny models, the judge of a run, and runs of families that broke in
different ways.
"""

import json

import pytest
import torch

from scripts import check_families as check
from scripts.measure.families import BY_NAME, FAMILIES, SIZES, make_config, make_model, save


def row(step: int, *, mismatch=1e-6, other=1.0, **changes) -> dict:
    """A line of metrics.jsonl of a run that is right."""
    zeros = {
        f"{key}/{domain}": 1e-7 for key in ("loss/total", "distill/k1") for domain in check.SELF
    }
    return {
        "step": step,
        "mismatch/abs_max": mismatch,
        "loss/total": 0.3,
        "loss/total/other": other,
        **zeros,
        **changes,
    }


# ---- The table of families -----------------------------------------------------------------------


def test_there_are_families_of_every_kind():
    types = {family.model_type for family in FAMILIES}
    assert len(types) >= 75
    assert 12 <= sum(family.telling for family in FAMILIES) <= 20
    assert {
        "llama",
        "gpt2",
        "opt",
        "mixtral",
        "gpt_oss",
        "mamba2",
        "qwen3_next",
        "deepseek_v3",
    } <= types


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_a_tiny_model_with_its_own_traits(family):
    config = make_config(family, pad_id=0, eos_id=1)
    with torch.device("meta"):
        model = check.AutoModelForCausalLM.from_config(config)
    assert (config.model_type == family.model_type) is family.is_known
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert model.get_output_embeddings().weight.shape[0] == SIZES["vocab_size"]
    for (
        key,
        value,
    ) in family.traits.items():  # a key that the class does not have would be one that nobody reads
        # Gemma 4 deals those to its layers
        if not isinstance(value, dict | list) and "global" not in key:
            assert getattr(config, key) == value


def test_traits_reach_the_model():
    gemma = make_config(BY_NAME["gemma2"], 0, 1)
    assert (
        gemma.layer_types == ["sliding_attention", "full_attention"]
        and gemma.attn_logit_softcapping == 5.0
    )
    assert make_config(BY_NAME["opt"], 0, 1).dropout == 0.1
    assert make_config(BY_NAME["qwen3"], 0, 1).tie_word_embeddings
    assert not make_config(BY_NAME["qwen3_untied"], 0, 1).tie_word_embeddings


def test_no_vector_of_a_model_is_all_zeros_or_ones():
    family = BY_NAME["qwen2"]
    model = make_model(family, make_config(family, 0, 1), seed=0)
    vectors = {name: p for name, p in model.named_parameters() if p.ndim == 1}
    assert any(name.endswith("q_proj.bias") for name in vectors)
    assert all(float(p.detach().std()) > 0.05 for p in vectors.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_family_that_transformers_lacks_has_its_name_in_the_file(tmp_path, tokenizer):
    save(BY_NAME["internlm2"], tokenizer, tmp_path, seed=0)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "internlm2"


def test_names_that_are_no_families_are_refused():
    assert [family.name for family in check.chosen("opt,gpt2", False)] == ["opt", "gpt2"]
    short, everything = check.chosen("", False), check.chosen("", True)
    assert everything == list(FAMILIES) and 12 <= len(short) < len(everything)
    with pytest.raises(ValueError, match="--families gpt9: no such family"):
        check.chosen("opt,gpt9", False)


# ---- The judge -----------------------------------------------------------------------------------


def test_a_run_whose_numbers_agree_is_right():
    verdict = check.judge(check.Outcome(0, "", [row(1), row(2, mismatch=9e-5)]))
    assert verdict.kind == "right" and not verdict.reason and verdict.figures["mismatch 2"] == 9e-5


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([row(1), row(2, mismatch=0.05)], "mismatch 2 0.05"),
        ([row(1, mismatch=2e-4), row(2)], "mismatch 1 0.0002"),
        ([row(1), row(2, mismatch=float("nan"))], "mismatch 2 nan"),
        ([row(1, **{"loss/total/same": 0.04}), row(2)], "loss same 0.04"),
        ([row(1, **{"distill/k1/samehf": -0.01}), row(2)], "k1 samehf 0.01"),
        ([row(1, other=1e-5), row(2)], "loss of another model"),
        ([row(1)], "1 steps in metrics.jsonl"),
    ],
)
def test_a_run_whose_numbers_differ_is_a_fault(rows, named):
    verdict = check.judge(check.Outcome(0, "", rows))
    assert verdict.kind == "fault" and named in verdict.reason


def test_a_run_that_ends_in_one_line_is_refused():
    outcome = check.Outcome(2, "warning: slow\nerror: --student_model x: no sdpa; give eager\n")
    assert check.judge(outcome) == check.Verdict(
        "refused", "--student_model x: no sdpa; give eager"
    )
    assert check.judge_teacher(outcome, 0.0).kind == "refused"


@pytest.mark.parametrize(
    ("outcome", "named"),
    [
        (check.Outcome(1, "error: x\n"), "status 1: x"),
        (check.Outcome(2, "error: x\nerror: y\n"), "status 2: y"),
        (check.Outcome(2, "Traceback (most recent call last):\nerror: x\n"), "status 2: x"),
        (
            check.Outcome(2, "error: the sampler is not the student\n", [row(1)]),
            "the sampler is not the student",
        ),
        (check.Outcome(2, "usage: train\n"), "usage: train"),
        (check.Outcome(-6, ""), "status -6: nothing on the console"),
        (check.Outcome(None, ""), "not done after"),
    ],
)
def test_a_run_that_ends_otherwise_is_a_fault(outcome, named):
    for verdict in (check.judge(outcome), check.judge_teacher(outcome, 0.0)):
        assert verdict.kind == "fault" and named in verdict.reason


def test_a_teacher_is_right_when_its_loss_is_that_of_transformers():
    outcome = check.Outcome(0, "", [{"loss/total": 1.25}])
    assert check.judge_teacher(outcome, 1.25003).kind == "right"
    assert check.judge_teacher(outcome, 1.26).reason == "loss 1.250000, transformers says 1.260000"
    assert check.judge_teacher(check.Outcome(0, ""), 1.0).kind == "fault"


def test_the_table_has_a_row_per_family_with_its_reason():
    right = check.Verdict("right", figures={"mismatch 2": 4e-6})
    refused = check.Verdict(
        "refused", "--student_model /tmp/x/student: no | sdpa; the traceback is in /tmp/x/run/logs"
    )
    also = check.Verdict("refused", "--teacher all /tmp/x/student: no | sdpa")
    wrong = check.Verdict("fault", "status 1: x")
    page = check.table(
        [
            check.Result("opt", right, {"vllm": right, "hf": right}, 30.0),
            check.Result("gpt_oss", refused, {"vllm": also, "hf": right}, 30.0),
            check.Result(
                "mpt",
                refused,
                {"vllm": also, "hf": check.Verdict("fault", "loss 1, expected 2")},
                30.0,
            ),
            check.Result(
                "phi",
                wrong,
                {name: check.Verdict("fault", check.SEE_STUDENT) for name in ("vllm", "hf")},
                30.0,
            ),
        ]
    )
    assert "Of 4 families 1 learn, 1 teach through vLLM and 2 through transformers." in page
    rows = page.splitlines()[-4:]
    assert rows[0].startswith("| opt | `opt` | OPT | yes | yes | yes | 4e-06 |")
    assert "| no | no | yes |" in rows[1] and rows[1].endswith("| no \\| sdpa |")
    assert "| no | no | **wrong** |" in rows[2] and rows[2].endswith(
        "| no \\| sdpa; loss 1, expected 2 |"
    )
    assert "| **wrong** | **wrong** | **wrong** |" in rows[3] and rows[3].endswith(
        "| status 1: x |"
    )


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["qwen3_moe", "smollm3", "gemma2", "lfm2"])
def test_a_family_trains_as_its_own_teacher(tmp_path, name):
    """Experts; vLLM's Transformers backend; a soft-cap in attention; rotation head by head."""
    result = check.check_family(BY_NAME[name], tmp_path)
    assert result.student.kind == "right", result


@pytest.mark.e2e
@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_a_teacher_of_another_family_scores_as_transformers_does(tmp_path, tokenizer, backend):
    save(BY_NAME["granite"], tokenizer, tmp_path / "student", seed=0)
    verdict = check.check_teacher(BY_NAME["granite"], tmp_path, backend)
    assert verdict.kind == "right" and verdict.figures["loss"] > 0.1, verdict


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_is_right_or_refused_in_one_line(tmp_path, family):
    result = check.check_family(family, tmp_path)
    assert not result.is_fault, result
