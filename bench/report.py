"""Time ``winnow report`` over made predictions: seconds and peak memory of the command.

::

    python bench/report.py                       # 1,000,000 predictions of 1,000 classes, 20,000 labels
    python bench/report.py --rows 100000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selection import CONFIG, fill, peak_bytes, say

from winnow_jobs import Workspace


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="images, all predicted")
    parser.add_argument("--labels", type=int, default=20_000, help="images of them that are labelled")
    options = parser.parse_args()
    options.vectors, options.dimensions = options.labels, 2  # labelled images have a vector
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as folder:
        config = Path(folder, "winnow.toml")
        config.write_text(CONFIG)
        workspace = Workspace(config)
        workspace.init()
        start = time.perf_counter()
        fill(workspace, options)
        say(f"{options.rows:,} predictions, {options.labels:,} labels made in {time.perf_counter() - start:.0f} s")
        command = [str(Path(sys.executable).with_name("winnow")), "--config", str(config), "report", "--json"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.05)
        took = time.perf_counter() - start
        if process.returncode or process.stdout is None:
            sys.exit(f"winnow report ended with {process.returncode}")
        result = json.load(process.stdout)
        say(f"{took:.1f} s, peak memory {peak / 1e9:.2f} GB, {result['num_bytes'] / 1e6:.2f} MB of HTML: {result}")


if __name__ == "__main__":
    main()
