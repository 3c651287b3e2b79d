"""Every metric of the project, with its unit. Prometheus adds the service as the `job` label."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

# The flow
RECORDS_IN = Counter(
    "fraud_alarm_records_in_total", "Records read and finished; for the producer, transactions fetched"
)
RECORDS_OUT = Counter("fraud_alarm_records_out_total", "Records written to Kafka, not counting dead letters")
DEAD_LETTERS = Counter("fraud_alarm_dead_letters_total", "Records written as dead letters")
SKIPPED = Counter("fraud_alarm_skipped_total", "Repeated records that were recognised and skipped")
WAITING = Gauge("fraud_alarm_waiting_records", "Records fetched from the payments API but not yet on their topic")
BATCH = Histogram(
    "fraud_alarm_batch_records", "Records in a batch", buckets=(1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
)
STAGE = Histogram(
    "fraud_alarm_stage_seconds", "Time that a stage takes, per batch or API response", ["stage"], buckets=_SECONDS
)
TRANSACTIONS = Counter("fraud_alarm_transactions_total", "Kafka transactions, by outcome", ["outcome"])

# How far behind
LAG = Gauge(
    "fraud_alarm_lag_records", "Records of the partition that are not finished yet", ["group", "topic", "partition"]
)
OLDEST = Gauge(
    "fraud_alarm_oldest_unprocessed_seconds",
    "Age of the partition's oldest unfinished record; 0 if all are finished",
    ["group", "topic", "partition"],
)
OUTAGES = Counter("fraud_alarm_outages_total", "Outages that have started")
OUTAGE_SECONDS = Counter("fraud_alarm_outage_seconds_total", "Seconds spent in outages")
OUTAGES_UNDER_WAY = Gauge("fraud_alarm_outages_under_way", "Outages that have not ended yet")
LOOP_AGE = Gauge(
    "fraud_alarm_loop_age_seconds", "Seconds since the slowest loop last turned, or the longest running call began"
)

# What the services are for
MODEL = Gauge("fraud_alarm_model_info", "1 for the model version in use under an alias", ["alias", "name", "version"])
MODEL_LOGGED_AT = Gauge(
    "fraud_alarm_model_logged_timestamp_seconds",
    "Time at which the version in use was logged, in epoch seconds",
    ["alias"],
)
# How far a feature of the most recent rows is from its distribution in the champion's training data.
DRIFT = Gauge("fraud_alarm_drift", "Population stability index or share of rows, over a window", ["feature", "measure"])
DRIFT_BEYOND = Gauge("fraud_alarm_drift_beyond_limit", "Number of drift measures that are beyond their limit")
CHALLENGED = Counter(
    "fraud_alarm_challenger_batches_total", "Batches offered to the challenger, by outcome", ["outcome"]
)
ALARMS = Counter(
    "fraud_alarm_alarms_total",
    "Alarms that a channel accepted (sent) or did not accept (failed)",
    ["channel", "outcome"],
)
ALARMS_WAITING = Gauge(
    "fraud_alarm_alarms_waiting", "Alarms of the current batch that the channel has not accepted yet", ["channel"]
)
ROWS = Counter("fraud_alarm_rows_written_total", "Rows written to the database")

# Create the series whose labels are known beforehand, so that they start at 0 rather than being absent.
for _outcome in ("committed", "aborted"):
    TRANSACTIONS.labels(_outcome)
for _outcome in ("scored", "rests", "busy"):
    CHALLENGED.labels(_outcome)
for _channel in ("mail", "webhook"):
    ALARMS_WAITING.labels(_channel)
    for _outcome in ("sent", "failed"):
        ALARMS.labels(_channel, _outcome)
