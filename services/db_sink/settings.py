"""Settings of the db_sink."""

from pydantic import Field, SecretStr

from shared.settings import Settings, StreamSettings


class DatabaseSettings(Settings):
    """The settings of everything that uses the database."""

    database_url: SecretStr = Field(description="Database URL, as in postgresql://user:password@host:5432/name")


class SinkSettings(StreamSettings, DatabaseSettings):
    """The settings of the db_sink."""

    db_sink_group: str = Field("db_sink", min_length=1, description="Consumer group on topic_2")
