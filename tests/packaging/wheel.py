"""Installs each wheel that it is given into an empty environment, and scores there.

torch and the other dependencies are those of the environment that runs this; they are no part of what is tried.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

SCORE = """
import sys, torch, transformers, rmfast
assert rmfast.__file__.startswith(sys.prefix), rmfast.__file__
shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
torch.manual_seed(0)
config = transformers.LlamaConfig(**shape, num_labels=1, pad_token_id=0)
model = transformers.LlamaForSequenceClassification(config).eval()
texts = [[1, 2, 3], [1, 2, 9, 8, 7]]
got = rmfast.RewardModel(model).score(texts)
with torch.no_grad():
    want = torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in texts])
assert torch.allclose(got, want, atol=1e-6), (got, want)
print(rmfast.__version__, rmfast.backends.runs("reward_head", "cpu").split()[0])
"""


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def scored(wheel: Path) -> str:
    """Version and backend of the reward head, in an environment that holds this wheel alone."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder, "bin", "python")
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
        # A path and not its .pth files: rmfast itself, installed in place there, is not seen.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        assert "rmfast" in run(python, "-m", "rmfast", "--version")
        return run(python, "-c", SCORE).strip()


def main(paths: list[str]) -> None:
    for path in paths:
        wheel = Path(path).resolve()
        version, backend = scored(wheel).split()
        expected = "eager" if wheel.name.endswith("-none-any.whl") else "cpp"
        if backend != expected:
            raise SystemExit(f"{wheel.name}: expected backend {expected}, got {backend}")
        print(f"{wheel.name}: rmfast {version}, {backend}")


if __name__ == "__main__":
    main(sys.argv[1:])
