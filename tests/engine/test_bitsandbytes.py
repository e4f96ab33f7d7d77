"""bitsandbytes' int8 and 4-bit weights on CPUs, where it is installed."""

from __future__ import annotations

import models as M
import pytest
import torch
import transformers

import rmfast

pytest.importorskip("bitsandbytes")

IDS = M.token_ids([5, 33, 12, 17, 40, 9])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("quantised")
    M.randomised(transformers.LlamaForSequenceClassification(config)).bfloat16().save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore:No tokenizer")
@pytest.mark.parametrize(
    "options, limit",
    [
        ({"load_in_8bit": True}, 0.15),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}, 0.05),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32}, 0.05),
    ],
    ids=["int8", "nf4", "fp4"],
)
def test_quantised_models_score_as_transformers_runs_them(folder, options, limit):
    config = transformers.BitsAndBytesConfig(**options)
    loaded = rmfast.load(folder, quantization_config=config, device="cpu")
    with torch.no_grad():
        own = torch.stack([loaded.model(torch.as_tensor(ids)[None]).logits[0, 0].float() for ids in IDS])
    # bf16, and int8 products of activations rounded to int8 row by row.
    assert (loaded.score(IDS) - own).abs().max() <= limit * own.std()
    assert "quantised, and multiply by themselves" in loaded.explain()
    moves = loaded.moves()
    assert ("llm_int8_threshold" in (moves or "")) == ("load_in_8bit" in options)
