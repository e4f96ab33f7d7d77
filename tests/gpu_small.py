"""A small run of every GPU kernel, for compute-sanitizer: odd sizes, views, rows, interventions, gradients."""

from __future__ import annotations

import torch

import rmfast
from rmfast.losses import binned_mmd, tcrm_loss
from rmfast.ops import neuron_stats, patch_rows, reward_head


def main() -> None:
    torch.manual_seed(0)
    for backend in ("triton", "cuda"):
        with rmfast.backend(backend):
            for dtype in (torch.bfloat16, torch.float32, torch.float64):
                for d, K, J in ((59, 1, 0), (136, 3, 2), (256, 20, 9)):
                    hidden = torch.randn(3, 7, d + 8, device="cuda").to(dtype)[:, 1:, 3 : 3 + d]
                    weight, gain = torch.randn(K, d, device="cuda"), torch.randn(d, device="cuda")
                    rows = torch.tensor([0, 17, 3, 3], device="cuda")
                    extra = {}
                    if J:
                        P = torch.randn(J, d, device="cuda") / d**0.5
                        extra = {"directions": P, "strengths": torch.rand(2, J, device="cuda")}
                    for norm in ("rms", "layer"):
                        reward_head(hidden, weight, norm=norm, norm_weight=gain, **extra)
                        reward_head(hidden, weight, norm=norm, norm_weight=gain, rows=rows, **extra)
                    leaf = hidden.detach().requires_grad_()
                    reward_head(leaf, weight.requires_grad_(), norm="rms", norm_weight=gain).sum().backward()
                base_rows, value_rows = torch.tensor([[0, 5, 2, 9, 1], [-1, 1, -1, 0, 7]], device="cuda")  # two outside
                for d in (59, 256, 4104, 20000):
                    buffer, gain = torch.randn(2, 6, d + 8, device="cuda").to(dtype), torch.randn(d, device="cuda")
                    for base, values in (buffer[..., :d], buffer[..., 3 : 3 + d]):
                        patch_rows(base, values, base_rows, value_rows, gain)
                        patch_rows(base, values, base_rows, value_rows, gain.to(dtype), gemma=True)
    with rmfast.backend("triton"):
        for n, m in ((2, 3), (37, 70), (600, 5)):
            buffer = torch.randn(n + 1, m + 3, device="cuda").relu().bfloat16()
            for x in (buffer[1:, 1 : m + 1], buffer[1:, 1 : m + 1].float(), buffer[1:, 1 : m + 1].T.contiguous().T):
                neuron_stats(x, torch.randn(n, 3, device="cuda"))
        for dtype in (torch.bfloat16, torch.float32):
            values = torch.randn(2, 2061, device="cuda").to(dtype)[:, 1:].requires_grad_()
            ends = torch.tensor([0, 5, 6, 2060], device="cuda")
            tcrm_loss(*values, ends, ends, margin=torch.rand(3, device="cuda"))[0].backward()
            for shape in ((150,), (150, 3)):
                x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
                index = torch.arange(150, device="cuda")
                binned_mmd(x, index % 7, groups=index % 2, bandwidth=[0.5, 2.0]).backward()
    torch.cuda.synchronize()
    print("ran every kernel")


if __name__ == "__main__":
    main()
