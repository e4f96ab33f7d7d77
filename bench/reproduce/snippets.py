"""Human-rated review snippets, out of the sdist of vaderSentiment 3.3.2 (cited in examples/demo_data.py)."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path


def read_snippets(sdist: Path) -> list[tuple[float, str]]:
    """(mean rating from −4 to 4, text), in one shuffled order, no text twice."""
    inner = "additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(sdist) as outer:
        packed = next(member for member in outer if member.name.endswith(inner))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(packed).read())) as archive:  # type: ignore[union-attr]
            file = archive.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            lines = file.read().decode().split("\n")  # type: ignore[union-attr]
    found: dict[str, float] = {}
    for line in filter(str.strip, lines):
        _, rating, text = line.rstrip("\r").split("\t", 2)
        found.setdefault(text, float(rating))
    rated = [(rating, text) for text, rating in found.items()]
    random.Random(0).shuffle(rated)
    return rated
