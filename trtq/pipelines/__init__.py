"""Any artefact or checkpoint as a diffusers pipeline, and images drawn with it."""
