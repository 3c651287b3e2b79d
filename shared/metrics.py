"""Every metric of the project, with its unit. Which service it is, Prometheus' job says."""

from prometheus_client import Counter, Gauge, Histogram

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

# The flow
RECORDS_IN = Counter("fraud_alarm_records_in_total", "Records read and finished; transactions fetched, of the producer")
RECORDS_OUT = Counter("fraud_alarm_records_out_total", "Records written to Kafka, dead letters aside")
DEAD_LETTERS = Counter("fraud_alarm_dead_letters_total", "Records kept as dead letters")
SKIPPED = Counter("fraud_alarm_skipped_total", "Repeats that were recognised and passed over")
WAITING = Gauge("fraud_alarm_waiting_records", "Records fetched from the payments API that are not on their topic yet")
BATCH = Histogram(
    "fraud_alarm_batch_records", "Records in a batch", buckets=(1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
)
STAGE = Histogram(
    "fraud_alarm_stage_seconds", "Time that a stage takes, for a batch or an answer", ["stage"], buckets=_SECONDS
)
TRANSACTIONS = Counter("fraud_alarm_transactions_total", "Kafka transactions, by how they ended", ["outcome"])

# How far behind
LAG = Gauge(
    "fraud_alarm_lag_records", "Records of the partition that are not finished", ["group", "topic", "partition"]
)
OLDEST = Gauge(
    "fraud_alarm_oldest_unprocessed_seconds",
    "Age of the partition's oldest record that is not finished; 0 if all are",
    ["group", "topic", "partition"],
)
OUTAGES = Counter("fraud_alarm_outages_total", "Outages that began")
OUTAGE_SECONDS = Counter("fraud_alarm_outage_seconds_total", "Seconds spent in outages")
OUTAGES_UNDER_WAY = Gauge("fraud_alarm_outages_under_way", "Outages that last")
LOOP_AGE = Gauge("fraud_alarm_loop_age_seconds", "Since the slowest loop, or a call under way, last turned")

# What the services are for
MODEL = Gauge("fraud_alarm_model_info", "1 for the version that serves under an alias", ["alias", "name", "version"])
MODEL_LOGGED_AT = Gauge(
    "fraud_alarm_model_logged_timestamp_seconds", "When the version in use was logged, as an epoch", ["alias"]
)
# Of the champion, over the last rows: how far a feature lies from what the model learnt from.
DRIFT = Gauge("fraud_alarm_drift", "Population stability index or share of rows, over a window", ["feature", "measure"])
DRIFT_BEYOND = Gauge("fraud_alarm_drift_beyond_limit", "Measures of drift that are beyond their limit")
CHALLENGED = Counter("fraud_alarm_challenger_batches_total", "Batches that the challenger was offered", ["outcome"])
ALARMS = Counter("fraud_alarm_alarms_total", "Alarms accepted, or tried and not accepted", ["channel", "outcome"])
ALARMS_WAITING = Gauge(
    "fraud_alarm_alarms_waiting", "Alarms of the present batch that are not accepted yet", ["channel"]
)
ROWS = Counter("fraud_alarm_rows_written_total", "Rows written to the database")

# Those whose label is known beforehand are 0, rather than absent, before the first.
for _outcome in ("committed", "aborted"):
    TRANSACTIONS.labels(_outcome)
for _outcome in ("scored", "rests", "busy"):
    CHALLENGED.labels(_outcome)
for _channel in ("mail", "webhook"):
    ALARMS_WAITING.labels(_channel)
    for _outcome in ("sent", "failed"):
        ALARMS.labels(_channel, _outcome)
