"""Settings of the predictor."""

from pathlib import Path

from pydantic import Field

from shared.settings import DeliveryGuarantee, RegistrySettings, StreamSettings


class ModelSettings(RegistrySettings):
    """The settings of whatever loads models."""

    model_python: str | None = Field(
        None,
        description="Python interpreter with other packages, which loads the models that were logged with these; "
        "the image has one if it was built with MODEL_REQUIREMENTS",
    )
    model_load_seconds: float = Field(120.0, gt=0, description="Seconds in which a model must be loaded")
    model_batch_seconds: float = Field(
        10.0, gt=0, description="Seconds in which a model must score a batch of up to a thousand transactions"
    )
    model_memory_mb: int = Field(2048, ge=256, description="Memory in MB that a model's process may use for its data")


class PredictorSettings(StreamSettings, ModelSettings):
    """The settings of the predictor."""

    predictor_group: str = Field("predictor", min_length=1, description="Name of the consumer group that reads topic_1")
    delivery: DeliveryGuarantee = Field("exactly_once", description="Delivery guarantee for records written to Kafka")
    model_refresh_seconds: float = Field(
        30.0, gt=0, description="Seconds between two checks of the registry for a new champion or challenger"
    )
    challenger_sample: float = Field(
        1.0, ge=0, le=1, description="Share of the champion's batches that the challenger also scores"
    )
    drift_psi: float = Field(
        0.25, gt=0, description="Population stability index above which a feature's drift is logged"
    )
    drift_rows: int = Field(1500, ge=500, description="Number of most recent rows to compare with the training data")
    compiled_scoring: bool = Field(
        True, description="Whether to compile tree models; compiling speeds up scoring and never changes a label"
    )
    model_cache_directory: Path = Field(
        Path("models"),
        description="Folder in which the last good models are cached; keep it when the container is replaced",
    )
