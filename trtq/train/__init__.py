"""Fine-tuning: one module per method, and a training loop that all methods share."""
