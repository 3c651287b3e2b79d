"""`python -m benchmarks [SUITE...]` measures, prints tables and writes JSON. Exit code 1 if a bar is not reached."""

import os
import sys


def run() -> int:
    """Set what numpy, scikit-learn and MLflow read when they are imported, then import them and measure."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the predictor
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from benchmarks.suites import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
