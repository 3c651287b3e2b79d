"""Entry point of `python -m benchmarks [SUITE...]`, which runs benchmark suites. See benchmarks.suites."""

import os
import sys


def run() -> int:
    """Set the variables that numpy, scikit-learn and MLflow read on import, then run the suites."""
    os.environ["OMP_NUM_THREADS"] = "1"  # as in the predictor
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from benchmarks.suites import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
