"""Prompts of the tests of `AugmentedLM`, and a tokenizer whose text is token ids."""

from latent_delib.data.tokenizer import Tokenizer

NEW = 9  # new tokens: enough for the window of 5 to leave latents and prompt behind
PROMPTS = ["the cat sat on a mat and a dog", "rain", "a", "green hills at night when the dog ran"]

# The same number of prompts and continuations; a prompt comes twice.
FIVE = [*PROMPTS, PROMPTS[0]]
TAILS = ["the mat", "on a green door", "rain fell over", "a", "a"]


class Ids(Tokenizer):
    """Its text is token ids: random weights write bytes that make no text."""

    def decode(self, ids):
        return [int(i) for i in ids]

    def decode_in_text(self, ids):
        return self.decode(ids)


def ids_of(lm, prompt):
    """Returns the tokens of a prompt, BOS first."""
    return [lm.tokenizer.bos_id, *lm.tokenizer.encode(prompt)]
