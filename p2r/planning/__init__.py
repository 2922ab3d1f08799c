"""Memory, traffic, time and cost of a pretraining job before it is started; the largest batch that fits."""
