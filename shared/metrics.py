"""Defines every metric of the project. Prometheus adds the service's name as the label `job`."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

# Flow of records
RECORDS_IN = Counter(
    "fraud_alarm_records_in_total", "Records that were read and finished; for the producer, rows fetched"
)
RECORDS_OUT = Counter("fraud_alarm_records_out_total", "Records written to Kafka, not counting dead letters")
DEAD_LETTERS = Counter("fraud_alarm_dead_letters_total", "Records written as dead letters")
SKIPPED = Counter("fraud_alarm_skipped_total", "Repeated records that were recognised and skipped")
WAITING = Gauge("fraud_alarm_waiting_records", "Records fetched from the payments API but not yet on their topic")
BATCH = Histogram(
    "fraud_alarm_batch_records", "Records in a batch", buckets=(1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
)
STAGE = Histogram(
    "fraud_alarm_stage_seconds", "Seconds that a stage takes per batch or API response", ["stage"], buckets=_SECONDS
)
TRANSACTIONS = Counter("fraud_alarm_transactions_total", "Kafka transactions, by outcome", ["outcome"])

# Lag and outages
LAG = Gauge(
    "fraud_alarm_lag_records", "Records of the partition that are not finished yet", ["group", "topic", "partition"]
)
OLDEST = Gauge(
    "fraud_alarm_oldest_unprocessed_seconds",
    "Age of the partition's oldest unfinished record; 0 if all records are finished",
    ["group", "topic", "partition"],
)
DELETED_UNREAD = Counter(
    "fraud_alarm_deleted_unread_total", "Offsets that the broker had deleted before they were read"
)
TOPIC_RECREATED = Counter(
    "fraud_alarm_topic_recreated_total", "Times that the topic turned out to be deleted and made again"
)
OUTAGES = Counter("fraud_alarm_outages_total", "Outages that have started")
OUTAGE_SECONDS = Counter("fraud_alarm_outage_seconds_total", "Seconds spent in outages")
OUTAGES_UNDER_WAY = Gauge("fraud_alarm_outages_under_way", "Outages that have not ended yet")
LOOP_AGE = Gauge("fraud_alarm_loop_age_seconds", "Seconds since the slowest loop or running call last made progress")

# Models, drift, alarms and stored rows
MODEL = Gauge("fraud_alarm_model_info", "1 for the model version in use under an alias", ["alias", "name", "version"])
MODEL_LOGGED_AT = Gauge(
    "fraud_alarm_model_logged_timestamp_seconds",
    "Time at which the version in use was logged, in epoch seconds",
    ["alias"],
)
# Drift is how far the most recent rows differ from the champion's training data.
DRIFT = Gauge(
    "fraud_alarm_drift",
    "Drift in a window of rows: population stability index, or share of rows",
    ["feature", "measure"],
)
DRIFT_BEYOND = Gauge("fraud_alarm_drift_beyond_limit", "Number of drift measures that are beyond their limit")
CHALLENGED = Counter(
    "fraud_alarm_challenger_batches_total", "Batches offered to the challenger, by outcome", ["outcome"]
)
ALARMS = Counter(
    "fraud_alarm_alarms_total",
    "Alarms that the mail server or webhook accepted (sent) or did not accept (failed)",
    ["channel", "outcome"],
)
ALARMS_WAITING = Gauge(
    "fraud_alarm_alarms_waiting", "Alarms of the current batch that have not been sent yet", ["channel"]
)
ROWS = Counter("fraud_alarm_rows_written_total", "Rows written to the database")

# Create the time series whose labels are known in advance, so that these series start at 0 and are never absent.
for _outcome in ("committed", "aborted"):
    TRANSACTIONS.labels(_outcome)
for _outcome in ("scored", "rests", "busy"):
    CHALLENGED.labels(_outcome)
for _channel in ("mail", "webhook"):
    ALARMS_WAITING.labels(_channel)
    for _outcome in ("sent", "failed"):
        ALARMS.labels(_channel, _outcome)
