"""From a model to text.

sampling.py     pure functions on logits: what may come next, and which of it does
detokenize.py   token ids to text as it arrives: never half a character, never beyond a stop string
generate.py     generate, stream, pieces: the prompt in one pass, then constant memory and time per token
"""
