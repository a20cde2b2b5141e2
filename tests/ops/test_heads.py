"""Hidden states and the head give the model's own logits, for each family that does something to
them; others are refused.

N tokens, V vocabulary, H hidden size.
"""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from opd.ops.heads import (
    FAMILIES,
    LOGIT_KEYS,
    LogitForm,
    OutputHead,
    find_head,
    load_head,
    logit_form,
    weights_beside_the_head,
)
from tests.support.heads import CASES, GPT, H, V, make_model


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(model, its form, its directory)"""
    model_type, changes, form = CASES[request.param]
    model = make_model(model_type, changes)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, form, path


def test_hidden_states_and_head_give_the_models_logits(case):
    """From the live model, as the student is used, and from its checkpoint, as a teacher is."""
    model, form, path = case
    assert logit_form(model.config) == form
    live = model.get_output_embeddings()
    stored = load_head(str(path))
    assert stored.form == form and stored.weight_VH.shape == (V, H)
    ids = torch.arange(2, 26).view(2, 12)
    with torch.no_grad():
        expected = model(ids).logits
        hidden = model.base_model(ids).last_hidden_state
        for weight, bias in ((live.weight, live.bias), (stored.weight_VH, stored.bias_V)):
            torch.testing.assert_close(
                form(linear(hidden, weight, bias)), expected, rtol=1e-5, atol=1e-5
            )
        if form != LogitForm():
            assert (linear(hidden, live.weight, live.bias) - expected).abs().max() > 0.1, (
                "the form matters here"
            )


def test_nothing_stands_beside_the_head(case):
    assert weights_beside_the_head(case[0]) == []


def test_config_as_dict_is_config_as_object(case):
    _, form, path = case
    assert logit_form(PreTrainedConfig.get_config_dict(path)[0]) == form


def test_defaults_of_the_family_count():
    """A config.json need not repeat them."""
    assert logit_form({"model_type": "gemma2"}) == LogitForm(softcap=30.0)
    assert logit_form({"model_type": "cohere"}) == LogitForm(scale=0.0625)
    assert logit_form({"model_type": "granite"}) == LogitForm()
    assert logit_form({"model_type": "qwen3"}) == LogitForm()


def test_nested_text_config():
    config = {
        "model_type": "gemma4",
        "text_config": {"model_type": "gemma4_text", "final_logit_softcapping": 7.0},
    }
    assert logit_form(config) == LogitForm(softcap=7.0)
    assert logit_form(AutoConfig.for_model(**config)) == LogitForm(softcap=7.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "recurrent_gemma"}, "logits_soft_cap = 30.0"),
        ({"model_type": "xlstm"}, "output_logit_soft_cap = 30.0"),
        ({"model_type": "minicpm3"}, "logits_scaling = 10.0"),
        ({"model_type": "llama", "logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"model_type": "granite", "logit_scale": 0.5}, "logit_scale = 0.5"),
        (
            {"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"},
            "logit_scale = inv_sqrt_d_model",
        ),
        (
            {
                "model_type": "gemma3",
                "text_config": {"model_type": "gemma3_text", "final_logit_softcapping": 9.0},
            },
            "final_logit_softcapping = 9.0",
        ),
        ({"model_type": "unheard_of", "mup_width_multiplier": 8.0}, "mup_width_multiplier = 8.0"),
        (
            {"model_type": "unheard_of", "text_config": {"lm_head_multiplier": 2.0}},
            "lm_head_multiplier = 2.0",
        ),
        ({"model_type": "gemma2", "final_logit_softcapping": 0.0}, "final_logit_softcapping = 0.0"),
        ({"model_type": "granite", "logits_scaling": -1.0}, "logits_scaling = -1.0"),
    ],
)
def test_what_no_form_expresses_is_refused(config, message):
    with pytest.raises(ValueError) as caught:
        logit_form(config)
    assert message in str(caught.value) and config["model_type"] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_between_hidden_states_and_head_are_found():
    found = weights_beside_the_head(make_model("bert", {"is_decoder": True}))
    assert "cls.predictions.transform.dense.weight" in found and not any(
        name.startswith("bert.") for name in found
    )
    assert "lm_head.dense.weight" in weights_beside_the_head(
        make_model("modernbert-decoder", {"bos_token_id": 2})
    )


# ---- The families of the installed transformers --------------------------------------------------

# Those that change their logits and are not in FAMILIES, because they are refused: by a key, or by
# a weight beside the head.
REFUSED = {"cohere_compass_text", "inkling_text", "minicpm3", "recurrent_gemma", "xlstm"}


def changes_its_logits(forward: ast.FunctionDef) -> bool:
    """Whether a forward multiplies, divides, adds to or soft-caps its logits, or the hidden states
    on their way to them.
    """
    for node in ast.walk(forward):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
            continue
        if node.targets[0].id not in ("logits", "lm_logits", "hidden_states"):
            continue
        for part in ast.walk(node.value):
            arithmetic = isinstance(part, ast.BinOp) and isinstance(
                part.op, ast.Mult | ast.Div | ast.Add | ast.Sub
            )
            capped = isinstance(part, ast.Call) and ast.unparse(part.func).split(".")[-1] in (
                "tanh",
                "soft_cap",
            )
            in_index = any(
                part in ast.walk(s.slice)
                for s in ast.walk(node.value)
                if isinstance(s, ast.Subscript)
            )
            if (arithmetic or capped) and not in_index:
                return True
    return False


def test_no_causal_model_changes_its_logits_unnoticed():
    """Reads the forward of every causal model: a new family that scales or caps must get a row, or
    be refused.
    """
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    changing, seen = set(), set()
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = path.read_text()
        # Only the classes in question are parsed: a class ends where the next line without
        # indentation begins.
        for name in names.intersection(re.findall(r"^class (\w+)\(", text, re.M)):
            source = re.search(rf"^class {name}\(.*\n(?:[ )].*\n|\n)*", text, re.M)[0]
            forward = next(
                (n for n in ast.parse(source).body[0].body if getattr(n, "name", "") == "forward"),
                None,
            )
            seen.add(name)
            if forward is not None and changes_its_logits(forward):
                changing.add(name)
    assert len(seen) > 150
    found = {
        model_type
        for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if name in changing
    }
    assert found == {*FAMILIES, *REFUSED}
    assert {key for _, key in FAMILIES.values()} <= set(LOGIT_KEYS)


# ---- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "changes", "name"),
    [
        ("gpt_neox", {}, "embed_out.weight"),
        ("gpt2", GPT, "transformer.wte.weight"),
        ("bloom", {"n_layer": 1, "n_head": 2}, "transformer.word_embeddings.weight"),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": H}, "model.decoder.embed_tokens.weight"),
        ("qwen3", {"tie_word_embeddings": True}, "model.embed_tokens.weight"),
        ("qwen3", {"tie_word_embeddings": False}, "lm_head.weight"),
    ],
)
def test_names_that_families_give_their_heads(model_type, changes, name, tmp_path):
    model = make_model(model_type, changes)
    model.save_pretrained(tmp_path)
    assert find_head(str(tmp_path)) == (tmp_path / "model.safetensors", name)
    assert torch.equal(load_head(str(tmp_path)).weight_VH, model.get_output_embeddings().weight)


def test_dtype_and_shards_of_the_checkpoint(tmp_path):
    model = make_model("phi", {}).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    head = load_head(str(tmp_path))
    assert head.weight_VH.dtype == head.bias_V.dtype == torch.bfloat16
    assert torch.equal(head.weight_VH, model.lm_head.weight) and torch.equal(
        head.bias_V, model.lm_head.bias
    )


def test_the_checkpoint_decides_which_of_two_is_the_head(tmp_path):
    """As in vLLM.

    Two that differ where the configuration says that they are one are refused before (`find_head`).
    """
    model = make_model("qwen3", {"tie_word_embeddings": True})
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "lm_head.weight": torch.zeros(V, H)}, tmp_path / "model.safetensors")
    assert torch.equal(load_head(str(tmp_path)).weight_VH, torch.zeros(V, H))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        find_head(str(tmp_path))


def test_a_checkpoint_without_a_head_or_with_an_unknown_form_is_named(tmp_path):
    save_file({"model.norm.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: its safetensors hold no output head .*lm_head\.weight"
    ):
        load_head(str(tmp_path))
    save_file({"lm_head.weight": torch.zeros(V, H)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "logit_scale": 2}))
    with pytest.raises(ValueError, match=rf"{tmp_path}: .*logit_scale = 2"):
        load_head(str(tmp_path))


# ---- The carriers --------------------------------------------------------------------------------


def test_the_form_by_hand():
    z = torch.tensor([0.0, 60.0, -60.0])
    expected = torch.tensor([0.0, 22.8478, -22.8478])  # 30 tanh(30 / 30)
    torch.testing.assert_close(LogitForm(scale=0.5, softcap=30.0)(z), expected, rtol=0, atol=1e-4)
    assert LogitForm()(z) is z
    for form in (LogitForm(scale=0.5), LogitForm(softcap=3.0), LogitForm(0.5, 3.0)):
        version = z._version
        form(z)
        assert z._version == version, "an argument is not written to"


def test_cut_and_to_keep_weight_bias_and_form_together():
    head = OutputHead(torch.arange(12.0).view(4, 3), torch.arange(4.0), LogitForm(scale=2.0))
    cut = head.cut(2)
    assert cut.weight_VH.tolist() == [[0, 1, 2], [3, 4, 5]] and cut.bias_V.tolist() == [0, 1]
    assert cut.form == head.form and cut.weight_VH.data_ptr() == head.weight_VH.data_ptr()
    moved = head.to("meta")
    assert moved.weight_VH.is_meta and moved.bias_V.is_meta and moved.form == head.form
    assert not head.weight_VH.is_meta
    bare = OutputHead(head.weight_VH)
    assert (
        bare.cut(3).bias_V is None and bare.to("meta").bias_V is None and bare.form == LogitForm()
    )
    assert torch.equal(head.pinned().weight_VH, head.weight_VH)
    if torch.cuda.is_available():
        assert head.pinned().weight_VH.is_pinned() and head.pinned().bias_V.is_pinned()
    with pytest.raises(AssertionError, match="bias"):
        OutputHead(torch.zeros(4, 3), torch.zeros(3))
