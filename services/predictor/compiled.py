"""Compiles tree ensembles with ONNX Runtime. A compiled model gives the same labels in a fraction of the time.

This module needs the optional extra `compiled`. Like scikit-learn, compiled trees round features to float32, and add up
the trees' results in float64: in float32, a sum of 150 trees would be wrong by up to 7e-7. Unlike scikit-learn, each
tree's results are kept in float32. A row whose probability is close to the threshold is therefore scored by the
original model, so that labels never differ.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np
from sklearn.ensemble import ExtraTreesClassifier, GradientBoostingClassifier, RandomForestClassifier
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeClassifier

TOLERANCE = 3e-7  # largest accepted difference between the compiled and the original model's probability
_CLOSE = 10 * TOLERANCE  # the original model scores rows that are closer than this to the threshold
_MAX_NODES = 200_000  # converting so many nodes takes 400 MB; the predictor takes 470 MB, and its container has 1 GB
_CONVERSION_TIMEOUT_S = 60.0  # converting 30,000 nodes takes 5 s, and converting 200,000 nodes takes 7 s
_COMPILABLE = (DecisionTreeClassifier, ExtraTreesClassifier, GradientBoostingClassifier, RandomForestClassifier)


class NotCompiled(Exception):
    """The estimator cannot be compiled, so the original estimator is served. The message gives the reason."""


class Compiled:
    """An estimator with compiled trees: a two-class tree ensemble, or a pipeline that ends with one."""

    def __init__(self, estimator: Any, *, threshold: float) -> None:
        """`threshold` is the probability at which the label changes.

        Raises NotCompiled if the estimator cannot be compiled.
        """
        self._trees = estimator.steps[-1][1] if isinstance(estimator, Pipeline) else estimator
        self._run = _compile(self._trees)
        has_steps = isinstance(estimator, Pipeline) and len(estimator.steps) > 1
        self._prepare: Callable[[Any], Any] = estimator[:-1].transform if has_steps else np.asarray
        self._threshold = threshold
        self.classes_ = self._trees.classes_

    def predict_proba(self, rows: Any) -> np.ndarray:
        """Return probabilities (n, 2). They differ from the original model's probabilities by at most TOLERANCE."""
        features = np.asarray(self._prepare(rows))
        with np.errstate(over="ignore"):
            rounded = features.astype(np.float32).astype(np.float64, order="C")
        likelihoods: np.ndarray = self._run(rounded).astype(float).clip(0.0, 1.0)
        unsure = (np.abs(likelihoods[:, 1] - self._threshold) < _CLOSE) | ~np.isfinite(rounded).all(axis=1)
        if unsure.any():
            likelihoods[unsure] = self._trees.predict_proba(features[unsure])
        return likelihoods


def _compile(trees: Any) -> Callable[[np.ndarray], np.ndarray]:
    if not isinstance(trees, _COMPILABLE):
        compilable = ", ".join(each.__name__ for each in _COMPILABLE)
        raise NotCompiled(f"{type(trees).__name__} is not one of the types that can be compiled: {compilable}")
    if len(trees.classes_) != 2:
        raise NotCompiled(f"the model has {len(trees.classes_)} classes, not 2")
    if (nodes := _nodes(trees)) > _MAX_NODES:
        raise NotCompiled(f"too large: {nodes} nodes, at most {_MAX_NODES} can be compiled")
    try:
        # ONNX Runtime reads this variable on import. Its telemetry would report each model.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "true")
        import onnxruntime
    except ImportError as error:
        raise NotCompiled(f"{error.name} is not installed; it is part of the extra `compiled`") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # to use more cores, run more replicas
    # The session loads a file, because it would keep a copy if it loaded bytes. An unnamed file is always deleted.
    with tempfile.TemporaryFile() as graph:
        _convert(trees, graph)
        session = onnxruntime.InferenceSession(f"/dev/fd/{graph.fileno()}", options, providers=["CPUExecutionProvider"])
    return lambda rows: session.run(["probabilities"], {"X": rows})[0]


def _convert(trees: Any, graph: IO[bytes]) -> None:
    """Write the trees to the file `graph` in ONNX format.

    A separate process converts the trees, because conversion does not give its memory back.

    Raises NotCompiled if conversion fails or takes too long.
    """
    with tempfile.TemporaryFile() as pickled:
        pickle.dump(trees, pickled)
        pickled.seek(0)
        try:
            done = subprocess.run(
                [sys.executable, "-I", __file__],
                stdin=pickled,
                stdout=graph,
                stderr=subprocess.PIPE,
                timeout=_CONVERSION_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise NotCompiled(f"conversion took more than {_CONVERSION_TIMEOUT_S:g} s") from None
    if done.returncode:
        last_line = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise NotCompiled(f"conversion failed: {last_line or f'exit code {done.returncode}'}")


def _onnx(trees: Any) -> bytes:
    """Convert the trees to ONNX format, with float64 as input, for which ONNX Runtime adds up in float64."""
    from skl2onnx import to_onnx

    model = to_onnx(trees, np.zeros((1, trees.n_features_in_)), options={"zipmap": False})
    # skl2onnx states float64 here for boosted trees, but the operator always returns float32.
    model.graph.output[1].type.tensor_type.elem_type = 1  # onnx.TensorProto.FLOAT
    graph: bytes = model.SerializeToString()
    return graph


def _nodes(trees: Any) -> int:
    """Count the nodes of all trees."""
    if isinstance(trees, DecisionTreeClassifier):
        return int(trees.tree_.node_count)
    return sum(int(tree.tree_.node_count) for tree in np.ravel(trees.estimators_))


if __name__ == "__main__":
    sys.stdout.buffer.write(_onnx(pickle.load(sys.stdin.buffer)))  # noqa: S301 - written by _convert
