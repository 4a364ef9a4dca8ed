"""Generative models over tokens, a folder each, and what they share; `regvq_fast.priors.registry` lists them."""
