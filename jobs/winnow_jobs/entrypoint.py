"""What a submitted job runs on the cluster: ``python -m winnow_jobs.entrypoint RETRIES ARGUMENTS…``.

It runs the ``winnow`` command, and again when its process was killed or the job failed, as often as RETRIES allows.
That is safe: a job that is run again continues where it was. A wrong call (exit code 2), Ctrl-C and `winnow jobs stop`
end it. It lives on the cluster, so that the machine that submitted the job may go away.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

logger = logging.getLogger("winnow_jobs.entrypoint")

_PAUSE_S = 5.0


def main() -> None:
    """Run the command line in ``sys.argv``."""
    retries = int(sys.argv.pop(1))
    if retries:
        sys.exit(_run_again_and_again(retries))
    try:
        from winnow_jobs.cli.main import main as winnow
    except ModuleNotFoundError as error:
        sys.exit(f"winnow: the cluster's Python lacks the package {error.name}; its image must hold what Winnow needs")
    winnow()


def _run_again_and_again(retries: int) -> int:
    """Exit code of the last run, as a shell has it."""
    from winnow_jobs import logs

    logs.configure(os.environ.get("WINNOW_LOG_FORMAT", "text"))
    command = [sys.executable, "-m", "winnow_jobs.entrypoint", "0", *sys.argv[1:]]
    for run in range(retries + 1):
        code = subprocess.run(command, check=False).returncode
        if code in (0, 2, 130) or run == retries:
            break
        why = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        logger.warning("the command %s; running it again in %g s (%d of %d)", why, _PAUSE_S, run + 1, retries)
        time.sleep(_PAUSE_S)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
