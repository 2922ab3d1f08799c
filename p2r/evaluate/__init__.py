"""Downstream evaluation: a task and its splits, few-shot trials, whole-scan inference, figures per patient."""
