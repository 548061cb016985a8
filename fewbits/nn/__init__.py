"""The modules that run: one transformer block, its linear layers, norms, embedding and loss head."""
