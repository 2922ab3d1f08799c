"""Few-shot segmentation: the search for settings on validation patients, trials, and their evaluation on test patients."""
