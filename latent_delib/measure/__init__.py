"""How good a model is: perplexity n tokens ahead, lm-eval's benchmarks, questions in training."""
