"""The demo model's own corpus, tokenizer, training and evaluation.

Owns everything that made `models/tandem-demo`; no service imports it.
"""
