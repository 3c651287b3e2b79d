"""The predictor's settings."""

from pathlib import Path

from pydantic import Field

from shared.settings import DeliveryGuarantee, RegistrySettings, StreamSettings


class PredictorSettings(StreamSettings, RegistrySettings):
    """What the predictor reads from its environment."""

    predictor_group: str = Field("predictor", min_length=1, description="Consumer group on topic_1")
    delivery: DeliveryGuarantee = Field("exactly_once", description="What is promised of what it writes to Kafka")
    model_refresh_seconds: float = Field(30.0, gt=0, description="How often the registry is asked for both aliases")
    challenger_sample: float = Field(1.0, ge=0, le=1, description="Share of the batches that a challenger scores")
    drift_psi: float = Field(0.25, gt=0, description="Population stability index above which a feature has drifted")
    drift_rows: int = Field(1500, ge=500, description="Rows that are held against what the model learnt from")
    compiled_scoring: bool = Field(True, description="Whether trees are compiled where that changes no answer")
    model_cache_directory: Path = Field(
        Path("models"), description="Where the last good model is kept; outlives a container"
    )
