"""Checkpoints of decoders and coprocessors, read and written tensor by tensor."""
