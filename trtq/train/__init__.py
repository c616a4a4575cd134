"""Fine-tuning: one file per method, over one loop."""
