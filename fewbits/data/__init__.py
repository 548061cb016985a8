"""Text in, batches out: corpora, tokenizers, the token store, batches as a function."""
