"""What single heads add: parts of what the output projection and the norm behind it give, which they sum to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rmfast.circuits.head_parts import head_part
from rmfast.engine.norms import Norm

N, H, D, WIDTH = 5, 3, 4, 10
NORMS = {
    "none": lambda: None,
    "rms": lambda: LlamaRMSNorm(WIDTH),
    "gemma": lambda: Gemma2RMSNorm(WIDTH),
    "layer": lambda: nn.LayerNorm(WIDTH, bias=False),
    "layer without a gain": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_parts_sum_to_what_attention_adds(norm, dtype):
    draw = torch.Generator().manual_seed(0)
    project, module = nn.Linear(H * D, WIDTH, bias=False, dtype=dtype), NORMS[norm]()
    heads = torch.randn(N, H, D, generator=draw).to(dtype)
    with torch.no_grad():
        project.weight.normal_(generator=draw)
        if module is not None:
            for weight in module.to(dtype).parameters():
                weight.uniform_(0.3, 2, generator=draw)
        behind = None if module is None else Norm.of(module, WIDTH)
        each = [head_part(project, behind, heads, head) for head in range(H)]
        whole = project(heads.flatten(1))
        whole = whole if module is None else module(whole)
    assert each[0].dtype == torch.float32
    loose = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(sum(each), whole.float(), rtol=loose, atol=loose)
