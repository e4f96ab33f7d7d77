"""`make fuzz MINUTES=30`: all fuzz tests again and again, never with the same examples, until the time is over.

Prints what was tried and the worst errors. Ends at the first failure, with pytest's account of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fuzzing


def main(minutes: float) -> int:
    start = time.time()
    until = start + 60 * minutes
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"RMFAST_FUZZ": "long", "RMFAST_FUZZ_UNTIL": str(until), "RMFAST_FUZZ_TALLY": folder}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "worksteal", Path(__file__).parent]
        while not failed and time.time() < until:
            failed = subprocess.run(command, env=env).returncode
        print(f"\ntried in {(time.time() - start) / 60:.1f} minutes:\n{fuzzing.report(Path(folder))}")
    return failed


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
