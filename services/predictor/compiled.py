"""Tree ensembles, compiled with ONNX Runtime: the same answers in a fraction of the time.

An optional extra (`compiled`). What is compiled compares float32 values, as scikit-learn's trees do, but adds up in
float32 as well; so a row whose probability comes close to the decision is scored again by the model itself, and labels
cannot differ.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from threading import Event
from typing import IO, Any

import numpy as np
from sklearn.ensemble import ExtraTreesClassifier, GradientBoostingClassifier, RandomForestClassifier
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeClassifier

TOLERANCE = 1e-6  # of a probability
_CLOSE = 10 * TOLERANCE
_MOST_NODES = 200_000  # 400 MB to convert them, beside 470 of a predictor that serves as many: its container has 1 GB
_LONGEST_S = 60.0  # 5 s for 30,000 nodes, 7 for 200,000
_COMPILABLE = (DecisionTreeClassifier, ExtraTreesClassifier, GradientBoostingClassifier, RandomForestClassifier)


class NotCompiled(Exception):
    """This estimator is served as it is; the message says why."""


class Compiled:
    """An estimator of two classes whose trees, the last step of a pipeline or all there is, are compiled."""

    def __init__(self, estimator: Any, *, threshold: float, shutdown: Event | None = None) -> None:
        """Raises NotCompiled, soon if at shutdown. `threshold` is the probability at which the label changes."""
        self._trees = estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator
        self._run = _compile(self._trees, shutdown)
        prepared = isinstance(estimator, Pipeline) and len(estimator.steps) > 1
        self._prepare: Callable[[Any], Any] = estimator[:-1].transform if prepared else np.asarray
        self._threshold = threshold
        self.classes_ = self._trees.classes_

    def predict_proba(self, rows: Any) -> np.ndarray:
        """Probabilities (n, 2), within TOLERANCE of the model's own."""
        features = np.asarray(self._prepare(rows))
        with np.errstate(over="ignore"):
            narrow = np.ascontiguousarray(features, dtype=np.float32)
        likelihoods: np.ndarray = self._run(narrow).astype(float).clip(0.0, 1.0)
        unsure = (np.abs(likelihoods[:, 1] - self._threshold) < _CLOSE) | ~np.isfinite(narrow).all(axis=1)
        if unsure.any():
            likelihoods[unsure] = self._trees.predict_proba(features[unsure])
        return likelihoods


def _compile(trees: Any, shutdown: Event | None) -> Callable[[np.ndarray], np.ndarray]:
    if not isinstance(trees, _COMPILABLE):
        raise NotCompiled(f"{type(trees).__name__} is not among {', '.join(each.__name__ for each in _COMPILABLE)}")
    if len(trees.classes_) != 2:
        raise NotCompiled(f"it tells {len(trees.classes_)} classes apart")
    if (nodes := _nodes(trees)) > _MOST_NODES:
        raise NotCompiled(f"{nodes} nodes would take too much memory to compile")
    try:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "true")  # read on import: it would report each model
        import onnxruntime
    except ImportError as error:
        raise NotCompiled(f"{error.name} is not installed (the extra `compiled`)") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # replicas, not threads, use more cores
    with tempfile.TemporaryFile() as graph:  # a session would keep the bytes, and no file is left behind
        _convert(trees, graph, shutdown)
        session = onnxruntime.InferenceSession(f"/dev/fd/{graph.fileno()}", options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(["probabilities"], {"X": rows})[0]


def _convert(trees: Any, graph: IO[bytes], shutdown: Event | None) -> None:
    """Write the trees as an ONNX graph. Raises NotCompiled.

    In a process of its own: it takes seconds in which no batch could be scored, and memory that stays taken.
    """
    command = [sys.executable, "-m", __name__]
    deadline = time.monotonic() + _LONGEST_S
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
        pickle.dump(trees, given)
        given.seek(0)
        with subprocess.Popen(command, stdin=given, stdout=graph, stderr=errors) as process:
            while process.poll() is None:
                late = time.monotonic() > deadline
                if late or (shutdown and shutdown.is_set()):
                    process.kill()
                    raise NotCompiled(f"to convert it takes more than {_LONGEST_S:g} s" if late else "the service ends")
                time.sleep(0.05)
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise NotCompiled(said or f"the process that converts it ended with {process.returncode}")


def _onnx(trees: Any) -> bytes:
    """The trees as an ONNX graph."""
    from skl2onnx import to_onnx

    graph: bytes = to_onnx(
        trees, np.zeros((1, trees.n_features_in_), np.float32), options={"zipmap": False}
    ).SerializeToString()
    return graph


def _nodes(trees: Any) -> int:
    """How many nodes all its trees have."""
    if isinstance(trees, DecisionTreeClassifier):
        return int(trees.tree_.node_count)
    return sum(int(tree.tree_.node_count) for tree in np.ravel(trees.estimators_))


if __name__ == "__main__":
    sys.stdout.buffer.write(_onnx(pickle.load(sys.stdin.buffer)))  # noqa: S301 - what _convert has put in
