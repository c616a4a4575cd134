"""What a single runtime needs: rewrites and rules applied when a graph is opened or built."""
