"""Checkpoints of decoders, read and written tensor by tensor."""
