"""Measures a model: perplexity n tokens ahead, lm-eval's benchmarks, questions in training."""
