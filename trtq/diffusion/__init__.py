"""Loading pipelines, schedules, guidance and sampling."""
