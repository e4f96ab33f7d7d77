"""`rmfast.load` of peft adapters: head, task, tokenizer and base are taken from what is there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import models as M
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import rmfast

peft = pytest.importorskip("peft")
TEXTS = M.token_ids([5, 20, 3])


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    """A causal LM: its config says nothing of labels, which transformers takes for two."""
    folder = tmp_path_factory.mktemp("base")
    config = M.decoder("llama").config.to_dict()
    config = {name: value for name, value in config.items() if name not in ("id2label", "label2id", "num_labels")}
    M.randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))).save_pretrained(folder)
    M.tokenizer().save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path, labels: int = 1, task: str = "SequenceClassification", **kw: Any) -> Any:
    """An adapter with weights that are not zero, saved; and the model that it makes."""
    model = getattr(transformers, f"LlamaFor{task}").from_pretrained(base, num_labels=labels, dtype=torch.float32)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.score.weight)
    model = peft.get_peft_model(model, peft.LoraConfig(**{"init_lora_weights": False, **kw})).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


def edited(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_same(folder: Path, model: Any, **kw: Any) -> None:
    torch.testing.assert_close(
        rmfast.load(folder, device="cpu", **kw).score(TEXTS), rmfast.RewardModel(model).score(TEXTS)
    )


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize(
    "kw",
    [
        {"task_type": "SEQ_CLS"},
        {"task_type": "TOKEN_CLS", "task": "TokenClassification"},
        {"modules_to_save": ["score"]},
        {"modules_to_save": ["score"], "task": "TokenClassification"},
    ],
    ids=["SEQ_CLS", "TOKEN_CLS", "no task_type", "no task_type, tokens"],
)
def test_an_adapter_on_a_language_model_has_the_labels_of_its_own_head(language_model, tmp_path, labels, kw):
    model = adapted(language_model, tmp_path, labels, **kw)
    assert_same(tmp_path, model)


def test_what_trl_saves_from_a_causal_lm_is_loaded_as_it_stands(language_model, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"prompt": "Q?", "chosen": f"good {i}", "rejected": "bad"} for i in range(4)]
    trainer = trl.RewardTrainer(
        str(language_model),
        trl.RewardConfig(
            str(tmp_path), max_steps=2, learning_rate=0.1, bf16=False, report_to="none", use_cpu=True, disable_tqdm=True
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft.LoraConfig(task_type="SEQ_CLS"),
    )
    trainer.train()
    trainer.save_model()
    assert_same(tmp_path, trainer.model.float().eval(), dtype="float32")


def test_num_labels_other_than_the_adapters_head_is_an_error(language_model, tmp_path):
    adapted(language_model, tmp_path, 3, task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"with num_labels=2: (.|\n)*score"):
        rmfast.load(tmp_path, device="cpu", num_labels=2)


def test_an_adapter_on_a_reward_model_keeps_the_head_that_it_does_not_bring(tmp_path):
    M.decoder("llama", 3).save_pretrained(tmp_path / "base")
    base = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="No tokenizer"):
        assert_same(tmp_path / "adapter", model)


def test_the_tokenizer_is_the_adapters_own_else_the_bases(language_model, tmp_path):
    adapted(language_model, tmp_path, task_type="SEQ_CLS")
    assert rmfast.load(tmp_path, device="cpu").tokenizer.chat_template is None
    M.tokenizer(chat=True).save_pretrained(tmp_path)
    assert rmfast.load(tmp_path, device="cpu").tokenizer.chat_template == M.TEMPLATE


def test_the_bases_config_beside_an_adapter_is_not_taken_for_a_model(language_model, tmp_path):
    model = adapted(language_model, tmp_path, task_type="SEQ_CLS")
    transformers.AutoConfig.from_pretrained(language_model).save_pretrained(tmp_path)
    assert_same(tmp_path, model)


def test_a_whole_model_beside_an_adapter_is_refused(language_model, tmp_path):
    """transformers would put the adapter on top of it, and give the scores of neither."""
    adapted(language_model, tmp_path, task_type="SEQ_CLS")
    M.decoder("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a whole model \(model\.safetensors\) and an adapter"):
        rmfast.load(tmp_path, device="cpu")


def test_a_head_that_neither_base_nor_adapter_has_is_refused(language_model, tmp_path):
    adapted(language_model, tmp_path)  # no task_type, nothing in modules_to_save
    with pytest.raises(ValueError, match=r"adapter on .*base.*no weights for its head, score\.weight"):
        rmfast.load(tmp_path, device="cpu")


@pytest.mark.parametrize("name", ["lora_A", "score"])
def test_an_adapter_without_its_own_weights_is_refused_by_name(language_model, tmp_path, name):
    adapted(language_model, tmp_path, task_type="SEQ_CLS")
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({key.replace(name, f"old_{name}"): tensor for key, tensor in weights.items()}, path)
    with pytest.raises(
        ValueError, match=rf"no weights for its head, {name}|lacks weights of its own adapter: .*{name}"
    ):
        rmfast.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task_type": "CAUSAL_LM"}, "Expected an adapter of task_type SEQ_CLS, TOKEN_CLS, got CAUSAL_LM"),
        ({"base_model_name_or_path": None}, "does not say of which model"),
    ],
)
def test_an_adapter_of_no_reward_model_is_refused(language_model, tmp_path, values, message):
    adapted(language_model, tmp_path, task_type="SEQ_CLS")
    edited(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        rmfast.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    "name", ["model.layers.2.self_attn.q_proj.lora_A.weight", "model.layers.0.mlp.up_proj.lora_B.weight", "score.bias"]
)
def test_weights_of_an_adapter_that_the_base_has_no_place_for_are_refused(language_model, tmp_path, name):
    """Trained on a base of more layers, or with other targets than its config says."""
    adapted(language_model, tmp_path, task_type="SEQ_CLS")
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({**weights, "base_model.model.lm_head.weight": torch.ones(2, 2)}, file, metadata={"format": "pt"})
    rmfast.load(tmp_path, device="cpu")
    save_file({**weights, f"base_model.model.{name}": torch.ones(2, 2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"has {name.replace('.', '[.]')}, which LlamaForSeq.* has no place for"):
        rmfast.load(tmp_path, device="cpu")


def test_a_base_that_is_gone_is_named_with_its_adapter(language_model, tmp_path):
    adapted(language_model, tmp_path, task_type="SEQ_CLS")
    edited(tmp_path, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"is an adapter on .*gone, which could not be loaded"):
        rmfast.load(tmp_path, device="cpu")


def test_tokens_that_were_added_and_trained_are_in_the_adapter(language_model, tmp_path):
    base = transformers.LlamaForSequenceClassification.from_pretrained(language_model, num_labels=1)
    torch.nn.init.normal_(base.score.weight)
    base.resize_token_embeddings(M.VOCAB + 4)
    added = [M.VOCAB + i for i in range(4)]
    config = peft.LoraConfig(task_type="SEQ_CLS", trainable_token_indices={"embed_tokens": added})
    model = peft.get_peft_model(base, config).eval()
    delta = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    torch.nn.init.normal_(delta)
    model.save_pretrained(tmp_path)
    texts = [[1, 2, M.VOCAB + 1], [M.VOCAB + 3, 4]]
    got = rmfast.load(tmp_path, device="cpu")
    torch.testing.assert_close(got.score(texts), rmfast.RewardModel(model).score(texts))


def test_tokens_that_only_the_tokenizer_has_get_no_random_rows(language_model, tmp_path):
    adapted(language_model, tmp_path, task_type="SEQ_CLS")
    tokenizer = M.tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(20)])
    tokenizer.save_pretrained(tmp_path)
    got = rmfast.load(tmp_path, device="cpu")
    with pytest.raises(rmfast.InputError, match=r"outside of \[0, 272\)"):
        got.score(["a <new19>"])
