"""Host-side data: corpora, tokenizers, examples and batches, in numpy and as pure functions of (seed, step)."""
