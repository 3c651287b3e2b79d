"""The packages that a model was logged with, beside those that are installed."""

import sys
from pathlib import Path

import pytest

from services.predictor.packages import Difference, closest, differences, in_words, installed, logged_with


def artifact(folder: Path, requirements: str, python: str = "3.11.7") -> Path:
    folder.mkdir(parents=True)
    (folder / "requirements.txt").write_text(requirements)
    (folder / "python_env.yaml").write_text(f"python: {python}\nbuild_dependencies:\n- pip==24.0\n")
    return folder


def environment(folder: Path, packages: dict[str, str]) -> str:
    """An interpreter beside which these packages are installed."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    for name, version in packages.items():
        about = folder / "lib" / "python3.11" / "site-packages" / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder / "bin" / "python")


def test_only_exact_versions_count(tmp_path: Path) -> None:
    lines = (
        "mlflow==2.17.0\nscikit-learn==1.5.2  # pinned\npandas[parquet]==2.2.3; python_version>'3'\nnumpy>=1\n-e .\n\n"
    )

    assert logged_with(artifact(tmp_path / "model", lines, "3.9.1")) == {
        "mlflow": "2.17.0",
        "scikit-learn": "1.5.2",
        "pandas": "2.2.3",
        "python": "3.9",
    }
    assert logged_with(tmp_path / "nowhere") == {}


def test_names_are_compared_as_pip_does() -> None:
    assert differences({"Scikit_Learn": "1.5.2"}, {"scikit-learn": "1.5.2"}) == ()
    assert differences({"xgboost": "3.0"}, {}) == (Difference("xgboost", "3.0", "none"),)


def test_a_difference_is_said_with_its_remedy() -> None:
    found = (Difference("scikit-learn", "1.5.2", "1.9.1"), Difference("python", "3.9", "3.11"))

    assert in_words(found) == (
        "logged with scikit-learn 1.5.2, here 1.9.1, python 3.9, here 3.11; "
        'build with MODEL_REQUIREMENTS="scikit-learn==1.5.2"'
    )
    assert in_words(()) == ""


@pytest.mark.parametrize(
    ("requirements", "own"),
    [
        ("scikit-learn==1.5.2\nmlflow==2.17.0\n", True),
        ("scikit-learn==0.0.1\n", False),  # neither has it
        ("", False),
    ],
)
def test_the_interpreter_with_fewer_differences_loads_the_model(tmp_path: Path, requirements: str, own: bool) -> None:
    model = artifact(tmp_path / "model", requirements, "{}.{}.0".format(*sys.version_info))
    other = environment(tmp_path / "other", {"scikit-learn": "1.5.2", "mlflow": "2.17.0"})

    found = closest(model, other)

    assert found.path == (other if own else sys.executable)
    assert bool(found.differences) == ("0.0.1" in requirements)


def test_an_image_without_an_environment_of_its_own_uses_the_predictor_s(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    model = artifact(tmp_path / "model", f"mlflow=={installed(sys.executable)['mlflow']}\n")

    assert closest(model, str(tmp_path / "bin" / "python")).path == sys.executable
