"""Served models: what computes the images of a request."""
