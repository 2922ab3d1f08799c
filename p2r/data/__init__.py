"""The data plane: NIfTI files -> a corpus of WebDataset shards -> batches, in an order computed by a pure function."""
