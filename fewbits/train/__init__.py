"""The loop around the step: configuration, records, evaluation, text samples."""
