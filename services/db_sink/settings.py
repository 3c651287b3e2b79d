"""The db_sink's settings."""

from pydantic import Field, SecretStr

from shared.settings import Settings, StreamSettings


class DatabaseSettings(Settings):
    """What whoever deals with the table alone reads."""

    database_url: SecretStr = Field(description="postgresql://user:password@host:5432/name")


class SinkSettings(StreamSettings, DatabaseSettings):
    """What the db_sink reads from its environment."""

    db_sink_group: str = Field("db_sink", min_length=1, description="Consumer group on topic_2")
