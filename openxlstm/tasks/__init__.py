"""What a language model is asked: scores of texts, and other people's evaluations.

scoring.py   log-likelihoods and continuations of token ids, batched, with contexts read once
lm_eval.py   the model class for lm-eval (optional dependency)
"""
