"""Fast twins of what numerics defines, and the one place that picks them."""
