"""Artefacts on disk: manifest, files, locks, and what a graph says about itself."""
