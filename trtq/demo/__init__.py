"""The models that ship with trtq, the scripts that trained them, and the demonstration."""
