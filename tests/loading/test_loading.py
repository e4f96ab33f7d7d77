"""`rmfast.load`: checkpoints, adapters and what is refused."""

from __future__ import annotations

import json

import models as M
import pytest
import torch
import transformers

import rmfast
from rmfast import RewardModel
from rmfast.texts.inputs import InputError

TEXTS = M.token_ids(M.LENGTHS)


def save(path, model, tokenizer=None):
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_load_reads_a_checkpoint_and_its_tokenizer(tmp_path, task):
    model, tok = M.decoder("llama", 2, task), M.tokenizer("decoder", chat=True)
    save(tmp_path, model, tok)
    loaded = rmfast.load(str(tmp_path), device="cpu")
    assert isinstance(loaded, RewardModel) and type(loaded.model) is type(model)
    pairs = [("a", "b"), ("hello", "world")]
    torch.testing.assert_close(loaded.score(pairs), RewardModel(model, tok).score(pairs))


def test_load_takes_dtype_device_pooling_and_passes_the_rest(tmp_path):
    save(tmp_path / "inner", M.decoder("llama"), M.tokenizer())
    loaded = rmfast.load(
        tmp_path, dtype=torch.bfloat16, device="cpu", pooling="last", subfolder="inner", attn_implementation="eager"
    )
    assert loaded.model.dtype == torch.bfloat16 and loaded.pooling == "last"
    assert loaded.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("task", ["SequenceClassification", "CausalLM"])
def test_a_softcap_is_not_dropped_where_transformers_would(tmp_path, task, monkeypatch):
    model = M.decoder("gemma2", task=task, attn_logit_softcapping=0.5)
    save(tmp_path, model, M.tokenizer("decoder"))
    head = None if task == "SequenceClassification" else rmfast.TokenHead(3)
    # What transformers says up to 5.23.
    monkeypatch.setattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", True)
    loaded = rmfast.load(tmp_path, device="cpu", head=head)
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0] for ids in TEXTS]  # (1,), or (T, vocabulary)
    want = torch.stack([x[-1, 3] if head else x[0] for x in logits])
    M.assert_rewards(loaded.score(TEXTS), want, 1.0)
    assert loaded.model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"by SDPA, which drops the softcap of 0\.5"):
        rmfast.load(tmp_path, device="cpu", head=head, attn_implementation="sdpa")


def test_load_keeps_the_checkpoints_dtype(tmp_path):
    save(tmp_path, M.decoder("llama").bfloat16(), M.tokenizer())
    assert rmfast.load(tmp_path, device="cpu").model.dtype == torch.bfloat16


def test_load_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    save(tmp_path, M.decoder("llama"), M.tokenizer())
    assert rmfast.load(tmp_path, device_map={"": "cpu"}).score(["x"]).shape == (1,)
    with pytest.raises(ValueError, match="device or device_map, got both"):
        rmfast.load(tmp_path, device="cpu", device_map={"": "cpu"})


def test_load_without_a_tokenizer_takes_token_ids_only(tmp_path):
    save(tmp_path, M.decoder("llama"))
    with pytest.warns(UserWarning, match="No tokenizer could be loaded"):
        loaded = rmfast.load(tmp_path, device="cpu")
    assert loaded.score([[1, 2]]).shape == (1,)
    with pytest.raises(InputError, match="needs a tokenizer"):
        loaded.score(["text"])


@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.parametrize(
    "options, error",
    [
        ({"compute": "bf16"}, "compute"),
        ({"compute": "fp32", "dtype": torch.float64}, "its weights are float64"),
        ({"invariant": 1}, "invariant"),
        ({"pooling": "first"}, "pooling"),
        ({"pooling": 1000}, r"pooling to be a token id in \[0, \d+\), got 1000"),
        ({"dtype": "int8"}, "floating dtype"),
        ({"device": "cuda:99"}, "(?i)cuda|nvidia"),
        ({"device": "cpu", "device_map": "auto"}, "device or device_map"),
        ({"trust_remote_code": "no"}, "trust_remote_code"),
        ({"head": 3}, "head to be of rmfast.heads"),
        ({"head": rmfast.TokenHead(1000)}, r"TokenHead\(1000.* got 1000"),
        ({"head": rmfast.TokenHead("+")}, "there is no tokenizer"),
    ],
)
def test_load_checks_its_arguments_before_it_reads_weights(tmp_path, monkeypatch, options, error):
    save(tmp_path, M.decoder("llama"))

    def reads(*args, **kwargs):
        pytest.fail("weights were read")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", reads)
    with pytest.raises((ValueError, TypeError, RuntimeError, AssertionError), match=error):
        rmfast.load(tmp_path, **options)


@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_weights_that_transformers_dequantises_are_run_in_fp32(tmp_path):
    model = M.decoder("llama")
    save(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "dequantize": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rm = rmfast.load(tmp_path, compute="fp32")
    torch.testing.assert_close(rm.score([[5, 6, 7]]), M.own(model, [[5, 6, 7]]), rtol=1e-4, atol=1e-5)


def test_load_refuses_a_language_model(tmp_path):
    save(tmp_path, transformers.LlamaForCausalLM(M.decoder("llama").config))
    with pytest.raises(ValueError, match=r"is not a reward model: its config names \['LlamaForCausalLM'\]"):
        rmfast.load(tmp_path)


def test_load_refuses_a_head_that_was_never_trained(tmp_path):
    config = save(tmp_path, transformers.LlamaForCausalLM(M.decoder("llama").config)) / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification"))
    with pytest.raises(ValueError, match=r"no weights for its head, score\.weight"):
        rmfast.load(tmp_path)


def test_load_of_a_gguf_file_says_that_its_head_is_not_read(tmp_path):
    writer = pytest.importorskip("gguf").GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"model\.gguf in .*body of a GGUF file and no head"):
        rmfast.load(tmp_path, gguf_file="model.gguf")


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "a/b/c", "~/models/mine"])
def test_load_of_what_is_no_folder_and_no_hub_id_says_so(path):
    with pytest.raises(FileNotFoundError, match=rf"a folder or a hub id .*there is no folder '{path}'"):
        rmfast.load(path)


def test_load_of_a_misspelt_name_says_that_there_is_no_such_folder(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"There is no folder 'missing-model' here, and of the hub: "):
        rmfast.load("missing-model")


def test_load_of_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*has no config\.json or adapter_config\.json"):
        rmfast.load(tmp_path)


REMOTE = """
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

class OwnRewardModel(LlamaPreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        return self.v_head(self.model(input_ids, attention_mask=attention_mask).last_hidden_state)[:, -1]
"""


def test_load_runs_a_checkpoints_own_code_when_trusted(tmp_path, monkeypatch):
    import json

    model = M.decoder("llama")
    state = {name.replace("score.", "v_head."): tensor for name, tensor in model.state_dict().items()}
    config = model.config.to_dict() | {
        "architectures": ["OwnRewardModel"],
        "auto_map": {"AutoModel": "own.OwnRewardModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(REMOTE)
    torch.save(state, tmp_path / "pytorch_model.bin")
    M.tokenizer().save_pretrained(tmp_path)
    loaded = rmfast.load(tmp_path, device="cpu", trust_remote_code=True)
    M.assert_rewards(loaded.score(TEXTS), M.own(model, TEXTS), M.reward_scale(model))
