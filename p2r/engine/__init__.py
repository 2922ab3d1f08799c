"""Training as generators of reports: they know nothing of Ray, of Prometheus, or of who consumes them."""
