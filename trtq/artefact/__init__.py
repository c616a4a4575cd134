"""Artefacts on disk: manifest, files, locks, and the metadata of graphs."""
