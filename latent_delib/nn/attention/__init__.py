"""Attention: the primitive that says what is meant, its forms, and the choice between them."""
