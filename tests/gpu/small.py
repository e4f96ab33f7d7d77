"""A small run of every GPU kernel, for compute-sanitizer: odd sizes, views, rows, interventions, gradients.

Each kernel in few instances, since a machine compiles each of them anew: run once without the sanitizer, they come from
Triton's cache (`small.py cuda apart`). `TRITON_INTERPRET=1 python tests/gpu/small.py cpu` is the Triton half in the
interpreter.
"""

from __future__ import annotations

import subprocess
import sys

import torch

import rmfast
from rmfast.losses import binned_mmd, tcrm_loss
from rmfast.ops import (
    gated_activation,
    neuron_stats,
    patch_rows,
    reward_head,
    rms_norm,
    rotary,
    suffix_attention,
    topk_encode,
)


def heads(dtype: torch.dtype) -> None:
    for d, K, J in ((59, 1, 0), (136, 3, 2), (256, 20, 9)):
        hidden = torch.randn(3, 7, d + 8).to(dtype)[:, 1:, 3 : 3 + d]
        weight, gain = torch.randn(K, d), torch.randn(d)
        extra = {"directions": torch.randn(J, d) / d**0.5, "strengths": torch.rand(2, J)} if J else {}
        reward_head(hidden, weight, norm="rms", norm_weight=gain, **extra)
        reward_head(hidden, weight, norm="layer", norm_weight=gain, rows=torch.tensor([0, 17, 3, 3]), **extra)
    leaf = hidden.detach().requires_grad_()
    reward_head(leaf, weight.requires_grad_(), norm="rms", norm_weight=gain).sum().backward()


def rows(dtype: torch.dtype, outside: int) -> None:
    base_rows, value_rows = torch.tensor([[0, 5, 2, outside, 1], [-1, 1, -1, 0, outside]])
    for d in (59, 4104):
        buffer, gain = torch.randn(2, 6, d + 8).to(dtype), torch.randn(d)
        for base, values in (buffer[..., :d], buffer[..., 3 : 3 + d]):
            patch_rows(base, values, base_rows, value_rows, gain)


def attention(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    cu, start, length = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 3, 70, 71], [0, 5, 0, 9], [5, 0, 0, 31]))
    asked = torch.tensor([0, 1, 1, 3, 4], dtype=torch.int32)  # the last rows of each suffix
    for size in sizes:
        q, k, v = (torch.randn(71, heads, size).to(dtype) for heads in (6, 2, 2))
        given = (k, v, cu, *torch.randn(2, 40, 2, size).to(dtype), start, length)
        suffix_attention(q, *given)
        suffix_attention(q[:4], *given, cu_queries=asked, softcap=20.0, window=9)


def token_wise(dtype: torch.dtype) -> None:
    for n, d in ((1, 59), (3, 4104)):
        x, y, w = torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype), torch.randn(d).to(dtype)
        rms_norm(x, w, residual=y, post_weight=w, eps=1e-6, gemma=True)
        gated_activation(x, y, kind="silu")
    q, k, turn = torch.randn(37, 6, 20).to(dtype), torch.randn(37, 2, 20).to(dtype), torch.randn(2, 37, 16)
    rotary(q, k, *turn.to(dtype), q_norm=torch.randn(20), k_norm=torch.randn(20))


def features(dtype: torch.dtype) -> None:
    for n, m in ((2, 3), (600, 5)):
        buffer = torch.randn(n + 1, m + 3).relu().to(dtype)
        neuron_stats(buffer[1:, 1 : m + 1], torch.randn(n, 3))
    for n, d, count, k in ((3, 5, 7, 7), (70, 64, 2048, 32)):
        buffer = torch.randn(n + d, count + d + 1).to(dtype)
        topk_encode(buffer[:n, 1 : d + 1], buffer[n:, d + 1 :], None, k)
    values = torch.randn(2, 2061).to(dtype)[:, 1:].requires_grad_()
    ends = torch.tensor([0, 5, 6, 2060])
    tcrm_loss(*values, ends, ends, margin=torch.rand(3))[0].backward()
    x, index = torch.randn(150).to(dtype).requires_grad_(), torch.arange(150)
    binned_mmd(x, index % 7, groups=index % 2, bandwidth=[0.5, 2.0]).backward()


PARTS = {
    "token_wise": lambda backend, outside: token_wise(torch.bfloat16),
    "features": lambda backend, outside: features(torch.bfloat16),
    "heads-bf16": lambda backend, outside: heads(torch.bfloat16),
    "heads-fp32": lambda backend, outside: heads(torch.float32),
    "rows-bf16": lambda backend, outside: rows(torch.bfloat16, outside),
    "rows-fp32": lambda backend, outside: rows(torch.float32, outside),
    "attention": lambda backend, outside: attention(torch.bfloat16, (64, 128, 256)[: 3 if backend == "cuda" else 2]),
}
TRITON_ALONE = ("token_wise", "features")


def main(device: str = "cuda", *names: str) -> None:
    """Runs all parts, or those named; of `apart` each in a process of its own, since compiling is one core's work."""
    if names == ("apart",):
        running = [subprocess.Popen((sys.executable, __file__, device, name)) for name in PARTS]
        if failed := [name for name, process in zip(PARTS, running) if process.wait()]:
            sys.exit(f"failed: {', '.join(failed)}")
        return
    torch.manual_seed(0)
    torch.set_default_device(device)
    outside = 9 if device == "cuda" else 5  # a GPU gives NaN outside
    for backend in ("triton", "cuda") if device == "cuda" else ("triton",):
        with rmfast.backend(backend):
            for name in names or PARTS:
                if backend == "triton" or name not in TRITON_ALONE:
                    PARTS[name](backend, outside)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"ran {', '.join(names) or 'every kernel'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
