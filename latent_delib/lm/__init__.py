"""The trained model, used: loading, decoding, sampling, scoring, a look into the latents."""
