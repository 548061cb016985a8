"""The definitions: what a format, a rounding, a loss and an update mean, in plain torch."""
