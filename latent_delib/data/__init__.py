"""Text to rows of tokens, the same rows for every process and every restart."""
