"""The producer's settings."""

from pathlib import Path

from pydantic import AnyHttpUrl, Field

from shared.settings import Backoff, DeliveryGuarantee, ServiceSettings


class ProducerSettings(ServiceSettings):
    """What the producer reads from its environment."""

    api_url: AnyHttpUrl = Field(
        AnyHttpUrl("https://real-time-payments-api.herokuapp.com/current-transactions"),
        repr=False,
        description="Where the transactions are polled from",
    )
    api_timeout_seconds: float = Field(30.0, gt=0, description="Longest wait for an answer")
    poll_interval_seconds: float = Field(15.0, ge=0, description="Time from one poll to the next; 0 is back to back")
    backoff_initial_seconds: Backoff = Field(1.0, description="First wait after a failed poll; doubled each time")
    backoff_max_seconds: Backoff = Field(60.0, description="Longest wait between two polls that fail")
    delivery: DeliveryGuarantee = Field("exactly_once", description="What is promised of what it writes to Kafka")
    journal_directory: Path = Field(
        Path("journal"), description="Where it keeps what it fetched; outlives the container"
    )
    recent_identities: int = Field(100_000, ge=1, description="How many transactions are remembered, to skip repeats")
    max_waiting_records: int = Field(100_000, ge=1, description="With so many not on the topic yet, it stops polling")
