"""Losses: pure functions of tensors, one number per pair or per token, and the dicts that name them.

`preference` reads pairs of answers, `unpaired` single answers with a thumb up or down, `policy` tokens that the policy
drew, `value` a critic's predictions, `reward` scores of a reward model, `language` token log-probabilities. `arguments`
turns `--loss` and `--loss-args` into one callable.
"""
