"""How good a model is: perplexity of the n-th token ahead, and the benchmarks of lm-eval."""
