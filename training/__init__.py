"""The model pipeline: features, training, and the aliases of model versions."""
