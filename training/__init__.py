"""The model pipeline: features, training, and which version has an alias."""
