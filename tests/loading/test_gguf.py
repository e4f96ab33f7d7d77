"""Bodies of GGUF files, which transformers dequantises, under a head that the caller gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import rmfast

gguf = pytest.importorskip("gguf")

IDS = [[1, 2, 3, 40], [5, 6]]
D, VOCABULARY, INNER, LAYERS = 256, 300, 512, 2
MATRICES = {
    "attn_q": (D, D),
    "attn_k": (D // 2, D),
    "attn_v": (D // 2, D),
    "attn_output": (D, D),
    "ffn_gate": (INNER, D),
    "ffn_up": (INNER, D),
    "ffn_down": (D, INNER),
}


def write(path, kind):
    """A Llama of random weights; gguf quantises to no K kinds, so their blocks are drawn as they are stored."""
    rng, to = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)

    def add(name, shape):
        if len(shape) == 1:
            writer.add_tensor(name, (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32))
        elif kind == "Q4_K":
            blocks = rng.integers(0, 256, (shape[0] * shape[1] // 256, 144), dtype=np.uint8)
            blocks[:, :4] = np.array([2e-5, 2e-4], np.float16).view(np.uint8)  # scales of scales and of minima
            writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=to)
        else:
            drawn = (0.05 * rng.standard_normal(shape)).astype(np.float32)
            writer.add_tensor(name, gguf.quants.quantize(drawn, to), raw_dtype=to)

    add("token_embd.weight", (VOCABULARY, D))
    add("output_norm.weight", (D,))
    for i in range(LAYERS):
        for name, shape in {"attn_norm": (D,), "ffn_norm": (D,), **MATRICES}.items():
            add(f"blk.{i}.{name}.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
@pytest.mark.filterwarnings("ignore:No tokenizer")
def test_quantised_files_score_as_transformers_runs_them(tmp_path, kind):
    write(tmp_path / "model.gguf", kind)
    options = {"gguf_file": "model.gguf", "dtype": torch.float32}
    weight = torch.randn(1, D, generator=torch.Generator().manual_seed(0))
    loaded = rmfast.load(tmp_path, head=rmfast.heads.Linear(weight=weight), **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with torch.no_grad():
        states = torch.stack([model.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in IDS])
        logits = model.lm_head(states)
    torch.testing.assert_close(loaded.score(IDS), states @ weight[0], rtol=1e-4, atol=1e-4)
    judged = rmfast.load(tmp_path, head=rmfast.TokenHead(3, 4), **options)
    torch.testing.assert_close(judged.score(IDS), logits[:, 3] - logits[:, 4], rtol=1e-4, atol=1e-4)
    assert "packed, fused layers" in judged.explain()
