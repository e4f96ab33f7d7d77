"""Loads the build tree that it is given by Hugging Face's `kernels`, and runs an op without an installed rmfast."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def main(tree: Path) -> None:
    here = Path(__file__).resolve().parents[2]
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != here]
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    from kernels import get_local_kernel

    kernel = get_local_kernel(tree.resolve())
    import rmfast

    assert Path(rmfast.__file__).is_relative_to(tree.resolve()), rmfast.__file__
    h, w, gain = torch.randn(5, 64), torch.randn(1, 64), torch.rand(64)
    want = torch.nn.functional.rms_norm(h, (64,), gain, 1e-6) @ w.T
    got = kernel.reward_head(h, w, norm="rms", norm_weight=gain, eps=1e-6)
    assert torch.allclose(got, want, atol=1e-5), (got, want)
    print(f"{Path(kernel.__file__).parent.name}: {rmfast.backends.runs('reward_head', 'cpu')}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
