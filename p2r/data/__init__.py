"""The data plane: NIfTI files -> a corpus of WebDataset shards -> batches in an order that is a pure function."""
