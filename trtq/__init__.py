"""trtq."""
