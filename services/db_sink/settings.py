"""Settings of the db_sink."""

from pydantic import Field, SecretStr

from shared.settings import Settings, StreamSettings


class DatabaseSettings(Settings):
    """The database settings, shared by all programs that use the database."""

    database_url: SecretStr = Field(
        description="URL of the database, for example postgresql://user:password@host:5432/name"
    )


class SinkSettings(StreamSettings, DatabaseSettings):
    """The settings of the db_sink."""

    db_sink_group: str = Field("db_sink", min_length=1, description="Name of the consumer group that reads topic_2")
