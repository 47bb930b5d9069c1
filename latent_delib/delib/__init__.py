"""What the paper adds to a decoder: traces, the coprocessor, the table of methods, the loss."""
