"""Pipelines, noise schedules, guidance and sampling."""
