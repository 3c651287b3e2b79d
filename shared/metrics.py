"""Every metric of the project, with its unit."""

from prometheus_client import Counter, Gauge

# Of the champion, over the last rows: how far a feature lies from what the model learnt from.
DRIFT = Gauge("fraud_alarm_drift", "Population stability index or share of rows, over a window", ["feature", "measure"])
MODEL = Gauge("fraud_alarm_model_info", "1 for the version that serves under an alias", ["alias", "name", "version"])
CHALLENGED = Counter("fraud_alarm_challenger_batches_total", "Batches that the challenger was offered", ["outcome"])
