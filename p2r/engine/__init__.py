"""Pretraining as a generator of reports, and its checkpoints. Ray, Prometheus and the command line are not used here."""
