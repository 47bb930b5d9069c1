"""Uses a trained model: loads it, decodes, samples, scores text, and inspects its latents."""
