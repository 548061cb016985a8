"""What people learn from runs: comparisons with verdicts."""
