"""Settings of the producer."""

from pathlib import Path

from pydantic import AnyHttpUrl, Field

from shared.settings import Backoff, DeliveryGuarantee, ServiceSettings


class ProducerSettings(ServiceSettings):
    """The settings of the producer."""

    api_url: AnyHttpUrl = Field(
        AnyHttpUrl("https://real-time-payments-api.herokuapp.com/current-transactions"),
        repr=False,
        description="URL of the payments API",
    )
    api_timeout_seconds: float = Field(
        30.0, gt=0, description="Seconds within which the response to a poll must be complete"
    )
    api_max_bytes: int = Field(
        16 * 1024 * 1024,
        ge=1024,
        description="Maximum size of a response in bytes, after decompression; what is beyond it is not read",
    )
    poll_interval_seconds: float = Field(
        15.0, ge=0, description="Seconds from the start of one poll to the start of the next; 0 means no pause"
    )
    backoff_initial_seconds: Backoff = Field(
        1.0, description="Seconds to wait after the first failed poll; doubled after each further failure"
    )
    backoff_max_seconds: Backoff = Field(60.0, description="Maximum number of seconds to wait after a failed poll")
    delivery: DeliveryGuarantee = Field("exactly_once", description="Delivery guarantee for records written to Kafka")
    journal_directory: Path = Field(
        Path("journal"),
        description="Folder for fetched records that are not in Kafka yet; keep it when the container is replaced",
    )
    recent_identities: int = Field(
        100_000, ge=1, description="Number of recent transactions to remember, so that repeated ones are skipped"
    )
    max_waiting_records: int = Field(
        100_000, ge=1, description="Polling pauses while this many or more records are waiting to be written to Kafka"
    )
