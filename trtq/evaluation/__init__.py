"""Evaluation of artefacts: metrics, gates and the HTML report."""
